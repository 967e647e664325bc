"""Every flag of train.py, declared once: name, type, default, choices, range and help.

timm's flags keep timm's names, types and defaults; their help texts are ours. Nothing here imports torch or timm
when it is loaded: ``--help`` and a mistyped flag are answered at once.
"""
import argparse
import os

from ..method.presets import PRESETS
from .parser import ParseKwargs, Parser

IMAGE_MODES = dict(L=1, LA=2, RGB=3, YCbCr=3, HSV=3, RGBA=4, RGBX=4, CMYK=4)  # Pillow's, with their channels
SCALES = ('none', 'sqrt', 'linear')
SCHEDULES = ('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'plateau', 'none')
TASKS = ('classification', 'multilabel')
TARGET_FORMATS = ('indices', 'multihot')
METRICS = dict(classification=('top1', 'top5', 'loss'), multilabel=('map', 'micro_f1', 'macro_f1', 'sample_f1', 'loss'))
LOSSES = ('ce', 'bce', 'asl', 'poly', 'jsd', 'twoway', 'zlpr', 'db')
DECAYS = ('linear', '1-sqrt', 'cosine', 'power', 'exp')
FILTERS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')


def create_parser() -> Parser:
    """Create the parser of train.py: timm's flags and ours."""
    parser = Parser(
        prog='train.py',
        description='Train a timm model, with --dks by Deeply-supervised Knowledge Synergy.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_timm_flags(parser)
    add_our_flags(parser)
    return parser


def add_timm_flags(parser: Parser) -> None:
    """Add the flags of timm's train.py."""
    for add_flags in (_add_data_flags, _add_model_flags, _add_optimizer_flags, _add_augmentation_flags, _add_run_flags):
        add_flags(parser)


def _add_data_flags(parser):
    add = parser.add_argument_group('Dataset parameters').add_argument
    parser.add_argument('data', nargs='?', metavar='DIR', help='dataset folder (older spelling of --data-dir)')
    add_source_flags(add)
    add('--train-split', metavar='NAME', default='train', help='split to train on')
    add('--val-split', metavar='NAME', default='validation', help='split to evaluate on, "" for none')
    add('--train-num-samples', type=int, at_least=1, help='length of a streamed or synthetic split')
    add('--val-num-samples', type=int, at_least=1, help='length of a streamed or synthetic split')


def _add_model_flags(parser):
    add = parser.add_argument_group('Model parameters').add_argument
    add('--model', type=str, default='resnet50', help='timm model name, also hf-hub:owner/name and local-dir:path')
    add('--pretrained', action='store_true', help='start from published weights')
    add('--pretrained-path', type=str, help='file to use as the published weights, head adapted')
    add('--initial-checkpoint', type=str, default='', metavar='PATH', help='weights for the new model, or backbone')
    add('--resume', type=str, default='', metavar='PATH', help='checkpoint to continue from, "auto" for the newest')
    add('--no-resume-opt', action='store_true', help='resume the weights, not the optimizer')
    add('--gp', type=str, metavar='POOL', help='global pooling: fast, avg, max, avgmax, catavgmax')
    add_input_flags(add)
    add_preprocessing_flags(add)
    add('-b', '--batch-size', type=int, default=128, at_least=1, help='images per process and step')
    add('-vb', '--validation-batch-size', type=int, at_least=1, help='batch size for evaluation')
    add('--fuser', type=str, default='', help='TorchScript fuser (refused: use --torchcompile)')
    add('--grad-accum-steps', type=int, default=1, help='batches per optimizer update')
    add('--grad-checkpointing', action='store_true', help='recompute activations to save memory')
    add('--fast-norm', action='store_true', help='normalize in low precision under autocast')
    add('--head-init-scale', type=float, help='factor on the classifier\'s initial weights')
    add('--head-init-bias', type=float, help='value of the classifier\'s initial bias')
    add('--torchcompile-mode', type=str, help='mode of torch.compile')
    add('--torchscript', action='store_true', help='script the model (refused: use --torchcompile)')
    add('--torchcompile', nargs='?', type=str, const='inductor', help='compile the model')
    add = parser.add_argument_group('Device parameters').add_argument
    add_device_flags(add)
    add('--model-dtype', type=str, choices=('float32', 'float16', 'bfloat16'), help='dtype of the weights')
    add('--no-ddp-bb', action='store_true', help='do not broadcast buffers between processes')
    add('--synchronize-step', action='store_true', help='wait for the device after each step')
    add('--local_rank', type=int, default=0, help='ignored: the launcher says it in the environment')
    add('--device-modules', type=str, nargs='+', runs_code=True, help='Python modules that bring a device backend')


def _add_optimizer_flags(parser):
    add = parser.add_argument_group('Optimizer parameters').add_argument
    add('--opt', type=str, default='sgd', metavar='OPTIMIZER', help='one of timm\'s optimizers')
    add('--opt-eps', type=float, help='epsilon, the optimizer\'s if not given')
    add('--opt-betas', type=float, nargs='+', help='betas, the optimizer\'s if not given')
    add('--momentum', type=float, default=0.9, at_least=0, at_most=1, help='momentum')
    add('--weight-decay', type=float, default=2e-5, at_least=0, help='weight decay')
    add('--clip-grad', type=float, at_least=0, help='clip gradients to this')
    add('--clip-mode', type=str, default='norm', choices=('norm', 'value', 'agc'), help='what --clip-grad bounds')
    add('--layer-decay', type=float, at_least=0, at_most=1, help='factor on the learning rate from layer to layer')
    add('--layer-decay-min-scale', type=float, default=0, help='least learning rate scale')
    add('--layer-decay-no-opt-scale', type=float, help='scale under which a layer is frozen')
    add('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE', help='more arguments of --opt')
    add = parser.add_argument_group('Learning rate schedule parameters').add_argument
    add('--sched', type=str, default='cosine', choices=SCHEDULES, help='one of timm\'s schedules')
    add('--sched-on-updates', action='store_true', help='step the schedule at every update')
    add('--lr', type=float, at_least=0, help='learning rate, in place of --lr-base')
    add('--lr-base', type=float, default=0.1, at_least=0, help='learning rate for batches of --lr-base-size images')
    add('--lr-base-size', type=int, default=256, at_least=1, help='batch size --lr-base is for')
    add('--lr-base-scale', type=str, default='', choices=('', 'linear', 'sqrt'), help='scaling rule, by --opt if empty')
    add('--lr-noise', type=float, nargs='+', help='from and to where noise is added')
    add('--lr-noise-pct', type=float, default=0.67, help='bound of the noise')
    add('--lr-noise-std', type=float, default=1.0, help='deviation of the noise')
    add('--lr-cycle-mul', type=float, default=1.0, above=0, help='growth of cycle lengths')
    add('--lr-cycle-decay', type=float, default=0.5, help='decay from cycle to cycle')
    add('--lr-cycle-limit', type=int, default=1, at_least=1, help='number of cycles')
    add('--lr-k-decay', type=float, default=1.0, help='k-decay of cosine and poly')
    add('--lr-decay-fn', type=str, choices=DECAYS, help='decay of wsd (1-sqrt) and rsqrt (linear)')
    add('--lr-stable-timescale', type=float, above=0, help='time scale of rsqrt in epochs, the warm-up if not given')
    add('--warmup-lr', type=float, default=1e-5, at_least=0, help='learning rate warm-up starts at')
    add('--min-lr', type=float, default=0, at_least=0, help='learning rate the schedule ends at')
    add('--epochs', type=int, default=300, at_least=1, help='epochs to train')
    add('--stop-epoch', type=int, at_least=1, help='stop after so many epochs of the schedule')
    add('--epoch-repeats', type=float, default=0., at_least=0, help='times a streamed dataset is read in one epoch')
    add('--start-epoch', type=int, at_least=0, help='epoch to start at, whatever a checkpoint says')
    add('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], at_least=0, help='where multistep decays')
    add('--decay-epochs', type=float, default=90, above=0,
        help='epochs between decays; the decay at the end of wsd and rsqrt, there 0.2 if not given, a share below 1')
    add('--warmup-epochs', type=int, default=5, at_least=0, help='epochs of warm-up')
    add('--warmup-prefix', action='store_true', help='warm up before the schedule, not within it')
    add('--cooldown-epochs', type=int, default=0, at_least=0, help='epochs at --min-lr at the end')
    add('--patience-epochs', type=int, default=10, at_least=0, help='patience of plateau')
    add('--decay-rate', '--dr', type=float, default=0.1, help='factor of a decay')


def _add_augmentation_flags(parser):
    add = parser.add_argument_group('Augmentation and regularization parameters').add_argument
    add('--no-aug', action='store_true', help='train on unaugmented images')
    add('--train-crop-mode', type=str, choices=('rrc', 'rkrc', 'rkrr'), help='kind of random crop')
    add('--scale', type=float, nargs='+', default=[0.08, 1.0], at_least=0, help='area range of the random crop')
    add('--ratio', type=float, nargs='+', default=[3 / 4, 4 / 3], above=0, help='aspect range of the random crop')
    add('--hflip', type=float, default=0.5, at_least=0, at_most=1, help='probability of a horizontal flip')
    add('--vflip', type=float, default=0., at_least=0, at_most=1, help='probability of a vertical flip')
    add('--color-jitter', type=float, default=0.4, at_least=0, help='strength of color jitter')
    add('--color-jitter-prob', type=float, at_least=0, at_most=1, help='probability of color jitter')
    add('--grayscale-prob', type=float, at_least=0, at_most=1, help='probability of gray images')
    add('--gaussian-blur-prob', type=float, at_least=0, at_most=1, help='probability of blur')
    add('--aa', type=str, metavar='NAME', help='AutoAugment, RandAugment, AugMix policy')
    add('--aug-repeats', type=float, default=0, at_least=0, help='times that processes repeat an image in a batch')
    add('--aug-splits', type=int, default=0, at_least=0, at_most=64, help='augmentation splits, 0 or at least 2')
    _add_loss_flags(add)
    add('--jsd-loss', action='store_true', help='Jensen-Shannon loss over --aug-splits')
    add('--bce-loss', action='store_true', help='binary cross-entropy')
    add('--bce-sum', action='store_true', help='sum binary cross-entropy over the classes')
    add('--bce-target-thresh', type=float, help='binarize soft targets at this value')
    add('--bce-pos-weight', type=float, help='weight of positives in binary cross-entropy')
    add('--reprob', type=float, default=0., at_least=0, at_most=1, help='probability of random erasing')
    add('--remode', type=str, default='pixel', choices=('const', 'rand', 'pixel'), help='fill of random erasing')
    add('--recount', type=int, default=1, at_least=1, help='most regions to erase')
    add('--resplit', action='store_true', help='leave the first augmentation split unerased')
    add('--mixup', type=float, default=0.0, at_least=0, help='alpha of mixup, off at 0')
    add('--cutmix', type=float, default=0.0, at_least=0, help='alpha of cutmix, off at 0')
    add('--cutmix-minmax', type=float, nargs='+', help='size range of cutmix, in place of alpha')
    add('--mixup-prob', type=float, default=1.0, at_least=0, at_most=1, help='probability of mixup or cutmix')
    add('--mixup-switch-prob', type=float, default=0.5, at_least=0, at_most=1, help='probability of cutmix of the two')
    add('--mixup-mode', type=str, default='batch', choices=('batch', 'pair', 'elem', 'half'), help='mix by this unit')
    add('--mixup-off-epoch', type=int, default=0, at_least=0, help='epoch at which mixing stops')
    add('--smoothing', type=float, default=0.1, at_least=0, below=1, help='label smoothing; of several labels 0')
    add('--train-interpolation', type=str, default='random', choices=('', 'random', *FILTERS), help='resize filter')
    add('--drop', type=float, default=0.0, at_least=0, at_most=1, help='dropout')
    add('--drop-connect', type=float, at_least=0, at_most=1, help='deprecated: use --drop-path')
    add('--drop-path', type=float, at_least=0, at_most=1, help='stochastic depth')
    add('--drop-block', type=float, at_least=0, at_most=1, help='drop block')
    add = parser.add_argument_group(
        'Batch norm parameters', 'The first two work with EfficientNet-like models only.').add_argument
    add('--bn-momentum', type=float, help='momentum of BatchNorm')
    add('--bn-eps', type=float, help='epsilon of BatchNorm')
    add('--sync-bn', action='store_true', help='BatchNorm statistics over all processes')
    add('--dist-bn', type=str, default='reduce', choices=('', 'reduce', 'broadcast'), help='statistics after an epoch')
    add('--split-bn', action='store_true', help='separate BatchNorm for each augmentation split')
    add = parser.add_argument_group('Model exponential moving average parameters').add_argument
    add('--model-ema', action='store_true', help='keep, evaluate and export an average of the weights')
    add('--model-ema-force-cpu', action='store_true', help='keep it on the CPU, unevaluated')
    add('--model-ema-decay', type=float, default=0.9998, at_least=0, at_most=1, help='decay of the average')
    add('--model-ema-warmup', action='store_true', help='warm the decay up')


def _add_loss_flags(add):
    add('--loss', type=str, choices=LOSSES, help='loss of the labels; ce, or bce for several labels, if not given')
    add('--asl-gamma-pos', type=float, default=1., at_least=0, help='asl: focus on positives')
    add('--asl-gamma-neg', type=float, default=4., at_least=0, help='asl: focus on negatives')
    add('--asl-clip', type=float, default=0.05, at_least=0, below=1, help='asl: margin of negatives, off at 0')
    add('--asl-reduction', type=str, default='batchmean', choices=('batchmean', 'sum', 'mean'), help='asl: reduction')
    add('--poly-epsilon', type=float, default=2., help='poly: coefficient of the first polynomial')
    add('--poly-gamma', type=float, default=0., at_least=0, help='poly: focus, several labels only')
    add('--poly-alpha', type=float, at_least=0, at_most=1, help='poly: balance of positives, several labels only')
    add('--twoway-tp', type=float, default=4., above=0, help='twoway: temperature of positives')
    add('--twoway-tn', type=float, default=1., above=0, help='twoway: temperature of negatives')
    add('--db-neg-scale', type=float, default=2., above=0, help='db: scale of negatives')
    add('--db-init-bias', type=float, default=0.05, at_least=0, help='db: shift by the frequency of a class')
    add('--db-focal-gamma', type=float, default=2., at_least=0, help='db: focus')
    add('--loss-class-weight', type=str, nargs='+', metavar='WEIGHT',
        help='inv_freq, effective_num, a number, one for each class, or a file of them')
    add('--loss-pos-weight', type=str, nargs='+', metavar='WEIGHT',
        help='neg_pos, a number, one for each class, or a file of them')
    add('--loss-weight-power', type=float, default=1., help='exponent of inv_freq and neg_pos')
    add('--loss-weight-beta', type=float, default=0.999, above=0, below=1, help='beta of effective_num')
    add('--loss-weight-max', type=float, above=0, help='most that a computed weight may be')
    add('--class-stats', type=str, metavar='FILE', help='JSON of class counts; the training data counts if not given')


def _add_run_flags(parser):
    add = parser.add_argument_group('Miscellaneous parameters').add_argument
    add('--seed', type=int, default=42, at_least=0, at_most=2 ** 32 - 1, help='random seed')
    add('--worker-seeding', type=str, default='all', choices=('all', 'part'), help='part does not seed NumPy')
    add('--log-interval', type=int, default=50, at_least=1, help='updates between log lines')
    add('--val-interval', type=int, default=1, at_least=1, help='epochs between evaluations')
    add('--recovery-interval', type=int, default=0, at_least=0, help='updates between recovery checkpoints')
    add('--save-epochs', type=int, nargs='+', at_least=1, help='keep milestone-N.pth.tar after so many epochs')
    add('--checkpoint-hist', type=int, default=10, at_least=1, help='checkpoints to keep')
    add_loader_flags(add)
    add('--save-images', action='store_true', help='write a training batch at every log line')
    add('--pin-mem', action='store_true', help='pin host memory')
    add('--no-prefetcher', action='store_true', help='normalize on the CPU')
    add('--output', type=str, default='', metavar='PATH', help='root of the output, ./output/train')
    add('--experiment', type=str, default='', metavar='NAME', help='folder of this run in --output')
    add('--eval-metric', type=str, default='top1', choices=tuple(dict.fromkeys(sum(METRICS.values(), ()))),
        help='metric of the best epoch; of several labels map if not given')
    add('--tta', type=int, default=0, at_least=0, help='views of each image that evaluation averages')
    add('--use-multi-epochs-loader', action='store_true', help='keep the loader running over epochs')
    add('--log-wandb', action='store_true', help='log to Weights & Biases')
    add('--wandb-project', type=str, help='its project')
    add('--wandb-tags', type=str, nargs='+', default=[], help='tags of its run')
    add('--wandb-resume-id', type=str, default='', metavar='ID', help='its run to continue')
    add('--train-img-sizes', type=int, nargs='+', at_least=1, at_most=16384, help='image sizes, one for each batch')
    add('--train-batch-sizes', type=int, nargs='+', at_least=1, help='batch size for each size')
    add('--train-size-probs', type=float, nargs='+', at_least=0, help='how often each size is drawn')
    add('--train-size-schedule', type=str, default='constant', choices=('constant', 'progressive'), help='sizes drawn')
    add('--train-size-schedule-spread', type=float, default=0.65, at_least=0, help='width of the progressive window')
    add('--train-size-random-mix', type=float, default=0.1, at_least=0, at_most=1, help='share of random sizes in it')
    add('--train-batches-per-epoch', '--train-steps-per-epoch', type=int, at_least=1, help='batches if sizes vary')
    add('--variable-batch-loss-scale', type=str, default='none', choices=SCALES, help='scale gradients by batch size')
    add('--naflex-loader', action='store_true', help='loader of patch sequences, for NaFlex models')
    add('--naflex-train-seq-lens', type=int, nargs='+', default=[128, 256, 576, 784, 1024], at_least=1,
        help='sequence lengths to train with')
    add('--naflex-max-seq-len', type=int, default=576, at_least=1, help='sequence length for evaluation')
    add('--naflex-patch-sizes', type=int, nargs='+', at_least=1, help='patch sizes to choose from')
    add('--naflex-patch-size-probs', type=float, nargs='+', at_least=0, help='probability of each of them')
    add('--naflex-loss-scale', type=str, default='linear', choices=SCALES, help='scale gradients by batch size')
    add('--naflex-patchify-channels-first', action='store_true', help='channels first within a patch')
    add = parser.add_argument
    add('--kd-model-name', type=str, help='teacher, a timm model')
    add('--kd-distill-type', type=str, default='logit', choices=('logit', 'feature', 'token'), help='what is distilled')
    add('--kd-loss-type', type=str, default='kl', choices=('kl',), help='loss of logit distillation')
    add('--distill-loss-weight', type=float, at_least=0, help='weight of the distillation loss')
    add('--task-loss-weight', type=float, at_least=0, help='weight of the label loss; alone, the other gets 1 minus it')
    add('--kd-temperature', type=float, default=4.0, above=0, help='temperature of distillation')
    add('--kd-student-feature-dim', type=int, at_least=1, help='features of the student, found if not given')
    add('--kd-teacher-feature-dim', type=int, at_least=1, help='features of the teacher, found if not given')
    add('--kd-token-distill-type', type=str, default='soft', choices=('soft', 'hard'), help='kind of its targets')


def add_our_flags(parser: Parser) -> None:
    """Add the flags that timm's train.py does not have."""
    parser.add_argument('-c', '--config', default='', metavar='FILE',
        help='YAML recipe (flags by name, - as _), or the name of one of this package, such as quickstart')
    add = parser.add_argument_group('Deeply-supervised Knowledge Synergy').add_argument
    add('--dks', action=argparse.BooleanOptionalAction, default=False, help='train with branches and synergy')
    add_branch_flags(add)
    add('--dks-preset', type=str, choices=tuple(PRESETS), help='who teaches whom, by name; further flags change it')
    add('--dks-ce-weight', type=float, nargs='+', default=[1.0], at_least=0, help='label weight, or one per classifier')
    add('--dks-synergy-weight', type=float, nargs='+', default=[1.0], at_least=0,
        help='weight of synergy, one or a whole matrix (rows teach columns); where an ensemble teaches one per student')
    add('--dks-direction', type=str, default='both', choices=('both', 'top-down', 'bottom-up', 'to-backbone', 'none'),
        help='who teaches: each other, deeper the shallower, shallower the deeper, branches the backbone, nobody')
    add('--dks-teacher', type=str, default='pairs', choices=('pairs', 'ensemble', 'ema'),
        help='each classifier by itself, the mean of all, or that with the averaged weights of --model-ema')
    add('--dks-synergy', type=str, choices=('softmax', 'sigmoid'),
        help='what classifiers compare: exclusive classes, or each by itself; by the loss if not given')
    add('--dks-temperature', type=float, default=1.0, above=0, help='temperature of synergy')
    add('--dks-start-epoch', type=int, default=0, at_least=0, help='first epoch with synergy, after labels alone')
    add('--dks-off-epoch', type=int, default=0, at_least=0, help='first epoch without branches, 0 for none')
    add('--dks-ramp', type=int, default=0, at_least=0, metavar='EPOCHS', help='epochs in which synergy grows')
    add = parser.add_argument_group('Small images').add_argument
    add('--train-pad', type=int, at_least=0, help='pad training images by N reflected pixels, and crop at random')
    add('--data-on-device', action='store_true', help='hold the decoded dataset on the device, and augment it there')
    add = parser.add_argument_group('Bad images, losses and gradients').add_argument
    most = os.environ.get('TIMM_DATASET_MAX_RETRIES') or 10  # timm's variable and default
    add('--max-bad-images', type=int, default=most, at_least=0, help='most images in a row that may be unreadable')
    add('--on-nonfinite', type=str, default='stop', choices=('stop', 'skip'), help='at inf or nan: stop, or skip it')
    add = parser.add_argument_group('Export and tracking').add_argument
    add('--export-dir', type=str, metavar='DIR', help='write the best weights here, pruned to the plain timm model')
    add('--overwrite', action='store_true', help='replace a model in --export-dir and, not in a recipe, on the Hub')
    add_card_flags(add)
    add('--push-to-hub', type=str, metavar='OWNER/NAME', help='push the export to this repository')
    add_hub_flags(add)
    add('--push-every-best', action='store_true', help='push each best checkpoint, in the background')
    add('--log-with', type=str, nargs='+', default=[], metavar='TRACKER', help='log to tensorboard, wandb, ...')


def add_input_flags(add) -> None:
    """Add the flags of a model's input and output."""
    add('--num-classes', type=int, at_least=1, help='number of classes, the model\'s if not given')
    add('--img-size', type=int, at_least=1, at_most=16384, help='height and width of the input')
    add('--in-chans', type=int, at_least=1, help='input channels')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE', help='more model arguments')


def add_source_flags(add) -> None:
    """Add the flags of a dataset, whatever its splits."""
    add('--data-dir', metavar='DIR', help='dataset folder, or a .tar of class folders')
    add('--dataset', metavar='NAME', default='',
        help='torch/, hfds/, hfids/, wds/ or tfds/NAME; digits; multidigits; synthetic')
    add('--dataset-download', action='store_true', help='let torch/ and tfds/ datasets download')
    add('--class-map', type=str, default='', metavar='FILENAME', help='file of class name -> index')
    add('--input-img-mode', type=str, choices=IMAGE_MODES, help='PIL mode images are converted to')
    add('--input-key', type=str, help='name of the image field')
    add('--target-key', type=str, help='name of the label field; a,b,c of one yes-or-no field for each class')
    add('--target-format', type=str, choices=TARGET_FORMATS, help='form of multi-label targets, indices if not given')
    add('--task', type=str, default='classification', choices=TASKS, help='one label an image, or several')
    add('--multilabel-threshold', type=float, default=0.5, above=0, below=1, help='probability of a label, for F1')
    add('--dataset-trust-remote-code', action='store_true', runs_code=True, help='let a dataset on the Hub run code')


def add_preprocessing_flags(add) -> None:
    """Add the flags that say how evaluation makes a model's input of an image."""
    add('--input-size', type=int, nargs=3, at_least=1, at_most=16384, help='channels, height and width')
    add('--crop-pct', type=float, at_least=0.05, at_most=2, help='share of the image that evaluation keeps')
    add('--mean', type=float, nargs='+', help='pixel mean for normalization')
    add('--std', type=float, nargs='+', above=0, help='standard deviation of pixels for normalization')
    add('--interpolation', type=str, default='', choices=('', *FILTERS), help='resize filter for evaluation')
    add('--channels-last', action='store_true', help='keep tensors in channels_last layout')


def add_device_flags(add) -> None:
    """Add the flags of device and precision."""
    add('--device', type=str, default='cuda', help='device to run on; where not given, the best one present')
    add('--amp', action='store_true', help='mixed precision')
    add('--amp-dtype', type=str, default='float16', choices=('float16', 'bfloat16'), help='on a CPU bfloat16')


def add_loader_flags(add) -> None:
    """Add the flags of the processes that load images."""
    add('-j', '--workers', type=int, default=4, at_least=0, help='loader workers per process')


def add_validation_flags(add) -> None:
    """Add the flags of ``dks-timm validate``; stored are those that are given, as a checkpoint's run has others."""
    def add_without_default(*names, **kwargs):
        add(*names, **kwargs).default = argparse.SUPPRESS

    add_source_flags(add_without_default)
    # Errors about data name flags of train.py, and so they are flags here, too.
    add_without_default('--split', '--val-split', dest='val_split', type=str, metavar='NAME',
                        help='split to evaluate on, validation if not given; "" for --data-dir itself')
    add_without_default('--num-samples', '--val-num-samples', dest='val_num_samples', type=int, at_least=1,
                        help='length of a streamed or synthetic split')
    add_input_flags(add_without_default)
    add_preprocessing_flags(add_without_default)
    add_without_default('-b', '--batch-size', type=int, at_least=1, help='images at a time, 256 if not given')
    add_loader_flags(add_without_default)
    add_device_flags(add_without_default)


def add_branch_flags(add) -> None:
    """Add the flags of the branches: which to attach, and when they run."""
    add('--dks-stages', type=int, nargs='+', metavar='STAGE', help='stages to supervise: dks-timm inspect lists them')
    add('--dks-branches', type=str, default='auto', choices=('auto', 'tail', 'conv'), help='own tail, or light conv')
    add('--dks-branch-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='[STAGE.]KEY=VALUE',
        help='arguments of the template, for every branch or for that of one stage')
    add('--dks-budget', type=float, help='bound on a training forward, in forwards of the backbone')
    add('--dks-batch-fraction', type=float, default=1.0, above=0, at_most=1, help='share of a batch for the branches')
    add('--dks-every', type=int, default=1, metavar='K', at_least=1, help='run the branches in every K-th update')


def add_card_flags(add) -> None:
    """Add the flags that say what an export holds besides the backbone."""
    add('--keep-branches', action='store_true', help='write the branches beside the exported backbone')
    add('--card-license', type=str, metavar='NAME', help='license of the weights, for the model card')
    add('--card-baseline', type=str, metavar='RUN', help='folder of a run to show beside this one in the card')


def add_hub_flags(add) -> None:
    """Add the flags that say how to push to the Hugging Face Hub."""
    add('--hub-private', action=argparse.BooleanOptionalAction, default=True, help='make a new repository private')
    add('--hub-revision', type=str, metavar='NAME', help='branch to push to, or tag:NAME to tag what is pushed to main')
    add('--hub-timeout', type=float, metavar='SECONDS', above=0, help='most that a push may take (300 + 2 for each MB)')
