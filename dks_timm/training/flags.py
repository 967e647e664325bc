"""The flags of timm's training script: names, types and defaults are timm's, the help texts are not."""
import argparse

# Flags of later versions of timm's script that are not here yet, and must not be taken for abbreviations of others.
NOT_YET = (
    '--loss', '--lr-decay-fn', '--lr-stable-timescale', '--multilabel-threshold', '--save-epochs', '--stop-epoch',
    '--target-format', '--task')


class ParseKwargs(argparse.Action):
    """timm's key=value action, imported when a flag uses it."""

    def __call__(self, parser, namespace, values, option_string=None):
        from timm import utils
        bad = [v for v in values if v and not v.partition('=')[1]]
        if bad:
            raise argparse.ArgumentError(self, f'{bad[0]!r} is not of the form key=value')
        try:
            utils.ParseKwargs.__call__(self, parser, namespace, values, option_string)
        except (MemoryError, RecursionError):  # of Python's parser
            raise argparse.ArgumentError(self, 'a value is nested too deeply') from None


def add_timm_flags(parser: argparse.ArgumentParser) -> None:
    """Add them all, in timm's order."""
    group = parser.add_argument_group('Dataset parameters')
    parser.add_argument('data', nargs='?', metavar='DIR', help='dataset folder (older spelling of --data-dir)')
    group.add_argument('--data-dir', metavar='DIR', help='dataset folder, or a .tar of class folders')
    group.add_argument('--dataset', metavar='NAME', default='',
                       help='dataset as "type/name": folder or tar if empty, torch/, hfds/, hfids/, wds/, tfds/, '
                            '"digits", the small one of scikit-learn, or "synthetic", random pixels to time a run with')
    group.add_argument('--train-split', metavar='NAME', default='train', help='split to train on')
    group.add_argument('--val-split', metavar='NAME', default='validation', help='split to evaluate on, "" for none')
    group.add_argument('--train-num-samples', type=int, metavar='N',
                       help='length of a streamed or synthetic train split')
    group.add_argument('--val-num-samples', type=int, metavar='N',
                       help='length of a streamed or synthetic validation split')
    group.add_argument('--dataset-download', action='store_true', help='let torch/ and tfds/ datasets download')
    group.add_argument('--class-map', type=str, default='', metavar='FILENAME', help='file of class name -> index')
    group.add_argument('--input-img-mode', type=str, help='PIL mode images are converted to')
    group.add_argument('--input-key', type=str, help='name of the image field')
    group.add_argument('--target-key', type=str, help='name of the label field')
    group.add_argument('--dataset-trust-remote-code', action='store_true',
                       help='let a Hugging Face dataset run code from its repository')

    group = parser.add_argument_group('Model parameters')
    group.add_argument('--model', type=str, default='resnet50', metavar='MODEL',
                       help='timm model name, also hf-hub:owner/name and local-dir:path')
    group.add_argument('--pretrained', action='store_true', help='start from published weights')
    group.add_argument('--pretrained-path', type=str, help='file to use as the published weights, head adapted')
    group.add_argument('--initial-checkpoint', type=str, default='', metavar='PATH',
                       help='weights to load into the new model (with --dks, into the backbone)')
    group.add_argument('--resume', type=str, default='', metavar='PATH',
                       help='checkpoint to continue from; "auto" takes the newest of this run')
    group.add_argument('--no-resume-opt', action='store_true', help='resume the weights, not the optimizer')
    group.add_argument('--num-classes', type=int, metavar='N', help='number of classes, the model\'s if not given')
    group.add_argument('--gp', type=str, metavar='POOL', help='global pooling: fast, avg, max, avgmax, catavgmax')
    group.add_argument('--img-size', type=int, metavar='N', help='height and width of the input')
    group.add_argument('--in-chans', type=int, metavar='N', help='input channels, 3 if not given')
    group.add_argument('--input-size', type=int, nargs=3, metavar='N', help='channels, height and width of the input')
    group.add_argument('--crop-pct', type=float, metavar='N', help='share of the image kept by the evaluation crop')
    group.add_argument('--mean', type=float, nargs='+', metavar='MEAN', help='pixel mean for normalization')
    group.add_argument('--std', type=float, nargs='+', metavar='STD', help='pixel deviation for normalization')
    group.add_argument('--interpolation', type=str, default='', metavar='NAME', help='resize filter for evaluation')
    group.add_argument('-b', '--batch-size', type=int, default=128, metavar='N', help='images a process and step')
    group.add_argument('-vb', '--validation-batch-size', type=int, metavar='N', help='batch size for evaluation')
    group.add_argument('--channels-last', action='store_true', help='keep tensors in channels_last layout')
    group.add_argument('--fuser', type=str, default='', help='TorchScript fuser (refused: use --torchcompile)')
    group.add_argument('--grad-accum-steps', type=int, default=1, metavar='N', help='batches to an optimizer update')
    group.add_argument('--grad-checkpointing', action='store_true', help='recompute activations to save memory')
    group.add_argument('--fast-norm', action='store_true', help='normalize in low precision under autocast')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE',
                       help='more arguments for timm.create_model')
    group.add_argument('--head-init-scale', type=float, help='factor on the classifier\'s initial weights')
    group.add_argument('--head-init-bias', type=float, help='value of the classifier\'s initial bias')
    group.add_argument('--torchcompile-mode', type=str, help='mode of torch.compile')
    either = group.add_mutually_exclusive_group()
    either.add_argument('--torchscript', action='store_true', help='script the model (refused: use --torchcompile)')
    either.add_argument('--torchcompile', nargs='?', type=str, const='inductor', metavar='BACKEND',
                        help='compile the model, with inductor unless another backend is named')

    group = parser.add_argument_group('Device parameters')
    group.add_argument('--device', type=str, default='cuda',
                       help='device to train on; where not given, the best one present')
    group.add_argument('--amp', action='store_true', help='mixed precision')
    group.add_argument('--amp-dtype', type=str, default='float16', help='float16 or bfloat16 (the default on a CPU)')
    group.add_argument('--model-dtype', type=str, help='dtype of the weights, without --amp')
    group.add_argument('--no-ddp-bb', action='store_true', help='do not broadcast buffers between processes')
    group.add_argument('--synchronize-step', action='store_true', help='wait for the device after each step')
    group.add_argument('--local_rank', type=int, default=0, help='ignored: the launcher says it in the environment')
    group.add_argument('--device-modules', type=str, nargs='+', help='Python modules that bring a device backend')

    group = parser.add_argument_group('Optimizer parameters')
    group.add_argument('--opt', type=str, default='sgd', metavar='OPTIMIZER', help='one of timm\'s optimizers')
    group.add_argument('--opt-eps', type=float, metavar='EPSILON', help='epsilon, the optimizer\'s if not given')
    group.add_argument('--opt-betas', type=float, nargs='+', metavar='BETA',
                       help='betas, the optimizer\'s if not given')
    group.add_argument('--momentum', type=float, default=0.9, metavar='M', help='momentum')
    group.add_argument('--weight-decay', type=float, default=2e-5, help='weight decay')
    group.add_argument('--clip-grad', type=float, metavar='NORM', help='clip gradients to this')
    group.add_argument('--clip-mode', type=str, default='norm', help='norm, value or agc')
    group.add_argument('--layer-decay', type=float, help='factor on the learning rate from layer to layer')
    group.add_argument('--layer-decay-min-scale', type=float, default=0, help='least learning rate scale')
    group.add_argument('--layer-decay-no-opt-scale', type=float, help='scale under which a layer is frozen')
    group.add_argument('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE',
                       help='more arguments for the optimizer')

    group = parser.add_argument_group('Learning rate schedule parameters')
    group.add_argument('--sched', type=str, default='cosine', metavar='SCHEDULER', help='one of timm\'s schedules')
    group.add_argument('--sched-on-updates', action='store_true', help='step the schedule at every update')
    group.add_argument('--lr', type=float, metavar='LR', help='learning rate, in place of --lr-base')
    group.add_argument('--lr-base', type=float, default=0.1, metavar='LR',
                       help='learning rate at --lr-base-size, scaled to the global batch size')
    group.add_argument('--lr-base-size', type=int, default=256, metavar='DIV', help='batch size --lr-base is for')
    group.add_argument('--lr-base-scale', type=str, default='', metavar='SCALE',
                       help='linear or sqrt scaling, chosen by the optimizer if empty')
    group.add_argument('--lr-noise', type=float, nargs='+', metavar='PCT', help='from and to where noise is added')
    group.add_argument('--lr-noise-pct', type=float, default=0.67, metavar='PERCENT', help='bound of the noise')
    group.add_argument('--lr-noise-std', type=float, default=1.0, metavar='STDDEV', help='deviation of the noise')
    group.add_argument('--lr-cycle-mul', type=float, default=1.0, metavar='MULT', help='growth of cycle lengths')
    group.add_argument('--lr-cycle-decay', type=float, default=0.5, metavar='MULT', help='decay from cycle to cycle')
    group.add_argument('--lr-cycle-limit', type=int, default=1, metavar='N', help='number of cycles')
    group.add_argument('--lr-k-decay', type=float, default=1.0, help='k-decay of cosine and poly')
    group.add_argument('--warmup-lr', type=float, default=1e-5, metavar='LR', help='learning rate warm-up starts at')
    group.add_argument('--min-lr', type=float, default=0, metavar='LR', help='learning rate the schedule ends at')
    group.add_argument('--epochs', type=int, default=300, metavar='N', help='epochs to train')
    group.add_argument('--epoch-repeats', type=float, default=0., metavar='N',
                       help='times a streamed dataset is read in one epoch')
    group.add_argument('--start-epoch', type=int, metavar='N', help='epoch to start at, whatever a checkpoint says')
    group.add_argument('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='EPOCH',
                       help='epochs at which multistep decays')
    group.add_argument('--decay-epochs', type=float, default=90, metavar='N', help='epochs from decay to decay')
    group.add_argument('--warmup-epochs', type=int, default=5, metavar='N', help='epochs of warm-up')
    group.add_argument('--warmup-prefix', action='store_true', help='warm up before the schedule, not within it')
    group.add_argument('--cooldown-epochs', type=int, default=0, metavar='N', help='epochs at --min-lr at the end')
    group.add_argument('--patience-epochs', type=int, default=10, metavar='N', help='patience of plateau')
    group.add_argument('--decay-rate', '--dr', type=float, default=0.1, metavar='RATE', help='factor of a decay')

    group = parser.add_argument_group('Augmentation and regularization parameters')
    group.add_argument('--no-aug', action='store_true', help='train on unaugmented images')
    group.add_argument('--train-crop-mode', type=str, help='rrc, rkrc or rkrr')
    group.add_argument('--scale', type=float, nargs='+', default=[0.08, 1.0], metavar='PCT',
                       help='area range of the random crop')
    group.add_argument('--ratio', type=float, nargs='+', default=[3 / 4, 4 / 3], metavar='RATIO',
                       help='aspect range of the random crop')
    group.add_argument('--hflip', type=float, default=0.5, help='probability of a horizontal flip')
    group.add_argument('--vflip', type=float, default=0., help='probability of a vertical flip')
    group.add_argument('--color-jitter', type=float, default=0.4, metavar='PCT', help='strength of color jitter')
    group.add_argument('--color-jitter-prob', type=float, metavar='PCT', help='probability of color jitter')
    group.add_argument('--grayscale-prob', type=float, metavar='PCT', help='probability of gray images')
    group.add_argument('--gaussian-blur-prob', type=float, metavar='PCT', help='probability of blur')
    group.add_argument('--aa', type=str, metavar='NAME', help='AutoAugment, RandAugment, AugMix policy')
    group.add_argument('--aug-repeats', type=float, default=0,
                       help='times an image is repeated over the processes of a batch')
    group.add_argument('--aug-splits', type=int, default=0, help='augmentation splits, 0 or at least 2')
    group.add_argument('--jsd-loss', action='store_true', help='Jensen-Shannon loss over --aug-splits')
    group.add_argument('--bce-loss', action='store_true', help='binary cross-entropy')
    group.add_argument('--bce-sum', action='store_true', help='sum binary cross-entropy over the classes')
    group.add_argument('--bce-target-thresh', type=float, help='binarize soft targets at this value')
    group.add_argument('--bce-pos-weight', type=float, help='weight of positives in binary cross-entropy')
    group.add_argument('--reprob', type=float, default=0., metavar='PCT', help='probability of random erasing')
    group.add_argument('--remode', type=str, default='pixel', help='fill of random erasing: const, rand, pixel')
    group.add_argument('--recount', type=int, default=1, help='most regions to erase')
    group.add_argument('--resplit', action='store_true', help='leave the first augmentation split unerased')
    group.add_argument('--mixup', type=float, default=0.0, help='alpha of mixup, off at 0')
    group.add_argument('--cutmix', type=float, default=0.0, help='alpha of cutmix, off at 0')
    group.add_argument('--cutmix-minmax', type=float, nargs='+', help='size range of cutmix, in place of alpha')
    group.add_argument('--mixup-prob', type=float, default=1.0, help='probability of either')
    group.add_argument('--mixup-switch-prob', type=float, default=0.5, help='probability of cutmix where both are on')
    group.add_argument('--mixup-mode', type=str, default='batch', help='mix by batch, pair, elem or half')
    group.add_argument('--mixup-off-epoch', type=int, default=0, metavar='N', help='epoch at which mixing stops')
    group.add_argument('--smoothing', type=float, default=0.1, help='label smoothing')
    group.add_argument('--train-interpolation', type=str, default='random', help='resize filter for training')
    group.add_argument('--drop', type=float, default=0.0, metavar='PCT', help='dropout')
    group.add_argument('--drop-connect', type=float, metavar='PCT', help='deprecated: use --drop-path')
    group.add_argument('--drop-path', type=float, metavar='PCT', help='stochastic depth')
    group.add_argument('--drop-block', type=float, metavar='PCT', help='drop block')

    group = parser.add_argument_group('Batch norm parameters', 'The first two work with EfficientNet-like models only.')
    group.add_argument('--bn-momentum', type=float, help='momentum of BatchNorm')
    group.add_argument('--bn-eps', type=float, help='epsilon of BatchNorm')
    group.add_argument('--sync-bn', action='store_true', help='BatchNorm statistics over all processes')
    group.add_argument('--dist-bn', type=str, default='reduce',
                       help='after an epoch, reduce or broadcast BatchNorm statistics, or "" to leave them')
    group.add_argument('--split-bn', action='store_true', help='separate BatchNorm for each augmentation split')

    group = parser.add_argument_group('Model exponential moving average parameters')
    group.add_argument('--model-ema', action='store_true', help='keep, evaluate and export an average of the weights')
    group.add_argument('--model-ema-force-cpu', action='store_true', help='keep it on the CPU, unevaluated')
    group.add_argument('--model-ema-decay', type=float, default=0.9998, help='decay of the average')
    group.add_argument('--model-ema-warmup', action='store_true', help='warm the decay up')

    group = parser.add_argument_group('Miscellaneous parameters')
    group.add_argument('--seed', type=int, default=42, metavar='S', help='random seed')
    group.add_argument('--worker-seeding', type=str, default='all', help='how workers are seeded: all or part')
    group.add_argument('--log-interval', type=int, default=50, metavar='N', help='updates from log line to log line')
    group.add_argument('--val-interval', type=int, default=1, metavar='N', help='epochs from evaluation to evaluation')
    group.add_argument('--recovery-interval', type=int, default=0, metavar='N',
                       help='updates from recovery checkpoint to recovery checkpoint')
    group.add_argument('--checkpoint-hist', type=int, default=10, metavar='N', help='checkpoints to keep')
    group.add_argument('-j', '--workers', type=int, default=4, metavar='N', help='loader workers a process')
    group.add_argument('--save-images', action='store_true', help='write a training batch at every log line')
    group.add_argument('--pin-mem', action='store_true', help='pin host memory')
    group.add_argument('--no-prefetcher', action='store_true', help='normalize on the CPU')
    group.add_argument('--output', type=str, default='', metavar='PATH', help='root of the output, ./output/train')
    group.add_argument('--experiment', type=str, default='', metavar='NAME', help='folder of this run in --output')
    group.add_argument('--eval-metric', type=str, default='top1', metavar='METRIC',
                       help='what is best: top1, top5 or loss')
    group.add_argument('--tta', type=int, default=0, metavar='N', help='views an image averaged in evaluation')
    group.add_argument('--use-multi-epochs-loader', action='store_true', help='keep the loader running over epochs')
    group.add_argument('--log-wandb', action='store_true', help='log to Weights & Biases')
    group.add_argument('--wandb-project', type=str, help='its project')
    group.add_argument('--wandb-tags', type=str, nargs='+', default=[], help='its tags')
    group.add_argument('--wandb-resume-id', type=str, default='', metavar='ID', help='its run to continue')
    group.add_argument('--train-img-sizes', type=int, nargs='+', help='image sizes to choose from, batch by batch')
    group.add_argument('--train-batch-sizes', type=int, nargs='+', help='batch size for each of them')
    group.add_argument('--train-size-probs', type=float, nargs='+', help='weight of each of them')
    group.add_argument('--train-size-schedule', type=str, default='constant', choices=('constant', 'progressive'),
                       help='keep the weights, or move from the first size to the last')
    group.add_argument('--train-size-schedule-spread', type=float, default=0.65, help='width of that window')
    group.add_argument('--train-size-random-mix', type=float, default=0.1, help='share of random sizes in it')
    group.add_argument('--train-batches-per-epoch', '--train-steps-per-epoch', type=int,
                       help='batches an epoch with --train-img-sizes')
    group.add_argument('--variable-batch-loss-scale', type=str, default='none', choices=('none', 'sqrt', 'linear'),
                       help='scale gradients by the size of the batch')
    group.add_argument('--naflex-loader', action='store_true', help='loader of patch sequences, for NaFlex models')
    group.add_argument('--naflex-train-seq-lens', type=int, nargs='+', default=[128, 256, 576, 784, 1024],
                       help='sequence lengths for training')
    group.add_argument('--naflex-max-seq-len', type=int, default=576, help='sequence length for evaluation')
    group.add_argument('--naflex-patch-sizes', type=int, nargs='+', help='patch sizes to choose from')
    group.add_argument('--naflex-patch-size-probs', type=float, nargs='+', help='probability of each of them')
    group.add_argument('--naflex-loss-scale', type=str, default='linear', choices=('none', 'sqrt', 'linear'),
                       help='scale gradients by the size of the batch')
    group.add_argument('--naflex-patchify-channels-first', action='store_true', help='channels first within a patch')

    parser.add_argument('--kd-model-name', type=str, help='timm model to distill from')
    parser.add_argument('--kd-distill-type', type=str, default='logit', choices=['logit', 'feature', 'token'],
                        help='what is distilled')
    parser.add_argument('--kd-loss-type', type=str, default='kl', help='loss of logit distillation: kl')
    parser.add_argument('--distill-loss-weight', type=float, help='weight of the distillation loss')
    parser.add_argument('--task-loss-weight', type=float,
                        help='weight of the label loss; alone, the distillation loss gets one minus it')
    parser.add_argument('--kd-temperature', type=float, default=4.0, help='temperature of distillation')
    parser.add_argument('--kd-student-feature-dim', type=int, help='features of the student, found if not given')
    parser.add_argument('--kd-teacher-feature-dim', type=int, help='features of the teacher, found if not given')
    parser.add_argument('--kd-token-distill-type', type=str, default='soft', choices=['soft', 'hard'],
                        help='targets of token distillation')
