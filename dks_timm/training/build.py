"""From the configuration to model, task, optimizer and learning rate, each as timm's train.py makes it."""
import logging

import timm
import torch
from safetensors import SafetensorError
from timm import task as tasks
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.loss import create_classification_loss, resolve_class_weights
from timm.models import NaFlexVit, resolve_model_input_args
from timm.optim import create_optimizer_v2, optimizer_kwargs

from ..errors import UNREADABLE, OptionError, closest, flag, given_flags, naming
from ..method.cost import training_cost
from ..method.create import add_branches
from ..method.loss import DKSLoss
from ..method.presets import PRESETS
from ..method.task import DKSDistillationTask, DKSTask
from .config import LOSSES_WITH_FLAGS, mixup_active
from .data import model_dtype

_logger = logging.getLogger(__name__)


def check_names(args) -> None:
    """Refuse a model or an optimizer that timm does not have, and a compiler that torch does not have."""
    check_model_name(args.model, '--model')
    if args.kd_model_name is not None:
        check_model_name(args.kd_model_name, '--kd-model-name')
    optimizer = args.opt.lower().removeprefix('lookahead_')
    known = timm.optim.list_optimizers()
    if optimizer not in known:
        raise OptionError(f'--opt {args.opt}: timm has no such optimizer{closest(optimizer, known)}')
    if args.torchcompile:
        with naming(given_flags(args, 'torchcompile', 'torchcompile_mode'), RuntimeError):
            torch.compile(lambda: None, backend=args.torchcompile, mode=args.torchcompile_mode)  # looked up, not run


def check_model_name(name: str, flag: str = 'MODEL') -> None:
    """Refuse a model that timm does not have."""
    if ':' not in name and not timm.is_model(name.partition('.')[0]):
        raise OptionError(f'{flag} {name}: timm has no such model{closest(name, timm.list_models())}')
    with naming_model(f'{flag} {name}'):
        resolve_model_input_args(name)


def naming_model(subject: str, further=None):
    """Raise an OptionError in place of timm's errors about a model's name, files, input or further arguments."""
    return naming(subject, AssertionError, SafetensorError, *UNREADABLE, *([TypeError] if further else []))


def create_model(args):
    """Create the model that the flags describe; with --dks a DKSModel around it."""
    kwargs = dict(
        in_chans=args.in_chans or (args.input_size or [3])[0],
        num_classes=args.num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        drop_block_rate=args.drop_block,
        global_pool=args.gp,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
        checkpoint_path=args.initial_checkpoint,
    )
    if args.pretrained_path:
        kwargs['pretrained_cfg_overlay'] = dict(file=args.pretrained_path, num_classes=-1)  # -1 adapts the classifier
    more = 'model_kwargs', 'gp', 'drop_path', 'drop_block', 'bn_momentum', 'bn_eps'
    subject = given_flags(args, 'model', *more, 'initial_checkpoint', 'pretrained_path')
    with naming_model(subject, given_flags(args, *more)):
        model = timm.create_model(args.model, args.pretrained, **kwargs, **args.model_kwargs)
    if args.naflex_loader and not isinstance(model, NaFlexVit):
        raise OptionError(f'--naflex-loader: --model {args.model} does not take patch sequences; use a naflexvit model')
    if args.dks:
        with naming(subject):
            model = _add_branches(args, model, {**kwargs, **args.model_kwargs})
    _init_heads(args, model)
    if args.grad_checkpointing:
        with naming(f'--grad-checkpointing with --model {args.model}', AssertionError):  # of a model that cannot
            model.set_grad_checkpointing(enable=True)
    return model


def _add_branches(args, backbone, kwargs):
    image_size = tuple(args.input_size[1:]) if args.input_size else args.img_size and (args.img_size, args.img_size)
    layout = dict(
        stages=args.dks_stages, branches=args.dks_branches, branch_kwargs=args.dks_branch_kwargs,
        budget=args.dks_budget, image_size=image_size)
    model = add_branches(
        backbone, args.model, args.pretrained, kwargs, layout=layout, batch_fraction=args.dks_batch_fraction)
    _logger.info(model.describe())
    share = share_of_updates(args)
    if args.dks_batch_fraction < 1 or share < 1:
        cost = training_cost(model, share)
        _logger.info(f'Training forward, on average: {cost:.2f}x the FLOPs of the backbone.')
    return model


def share_of_updates(args) -> float:
    """Return the share of the updates in which branches run."""
    return min(args.dks_off_epoch or args.epochs, args.epochs) / args.epochs / args.dks_every


@torch.no_grad()
def _init_heads(args, model):
    """Scale and bias the classifiers as --head-init-scale and --head-init-bias say."""
    heads = model.get_classifiers() if args.dks else model.get_classifier()
    for head in heads if isinstance(heads, (list, tuple)) else [heads]:  # two of a distilled model
        if args.head_init_scale is not None:
            head.weight.mul_(args.head_init_scale)
            head.bias.mul_(args.head_init_scale)
        if args.head_init_bias is not None:
            head.bias.fill_(args.head_init_bias)


def place_model(args, model, input_size, accelerator, subject=''):
    """Check that the model takes images of (C, H, W); move it to its device, dtype, layout and kind of BatchNorm.

    An error begins with the subject, by default the flags that describe the model.
    """
    if not args.naflex_loader:
        _check_input_size(args, model, input_size, subject or given_flags(args, 'model', 'model_kwargs', 'gp'))
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    model.to(device=accelerator.device, dtype=model_dtype(args))
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    return convert_sync_batchnorm(model) if args.sync_bn and accelerator.num_processes > 1 else model


@torch.no_grad()
def _check_input_size(args, model, input_size, subject):
    """Refuse images that the model does not take, by evaluating one."""
    model.eval()
    for size in [input_size, *((input_size[0], size, size) for size in args.train_img_sizes or ())]:
        with naming_model(f'{subject}: input size {size}', args.model_kwargs):
            model(torch.zeros(1, *size))
    model.train()


def create_criterion(args, num_classes=None, class_stats=None):
    """Create the loss of one classifier; ``class_stats`` are those of :func:`dks_timm.training.data.class_stats`."""
    settings = dict(smoothing=args.smoothing, soft_targets=mixup_active(args))
    multi_label = args.task == 'multilabel'
    # Of --bce-loss, timm's script makes cross-entropy where targets are neither smoothed nor mixed.
    binary = multi_label or args.bce_loss and any(settings.values())
    loss = args.loss or ('jsd' if args.jsd_loss else 'bce' if binary else 'ce')
    if args.loss or loss == 'bce':
        settings.update(bce_target_thresh=args.bce_target_thresh, bce_sum=args.bce_sum, pos_weight=args.bce_pos_weight)
    if loss == 'jsd':
        settings.update(jsd_splits=args.aug_splits)
    if loss == 'db':
        settings.update(zip(('class_counts', 'num_samples'), class_stats, strict=True))
    if loss in LOSSES_WITH_FLAGS:
        settings.update({name: value for name, value in vars(args).items() if name.startswith(f'{loss}_')})
    for name in ('class_weight', 'pos_weight'):
        settings.update(_class_weights(args, name, num_classes, class_stats))
    with naming(given_flags(args, 'loss', 'loss_class_weight', 'loss_pos_weight'), ValueError):
        return create_classification_loss(loss, multi_label=multi_label, **settings)


def _class_weights(args, name, num_classes, class_stats):
    """Return the argument of the loss that --loss-class-weight or --loss-pos-weight stands for, {} without it."""
    given = ' '.join(getattr(args, f'loss_{name}') or ())
    if not given:
        return {}
    how = dict(power=args.loss_weight_power, beta=args.loss_weight_beta, max_weight=args.loss_weight_max)
    with naming(f'{flag(f"loss_{name}")} {given}', OSError, TypeError, ValueError):
        weight = resolve_class_weights(given, name, class_stats, **how)
    if torch.is_tensor(weight) and len(weight) != num_classes:
        raise OptionError(f'{flag(f"loss_{name}")} {given}: holds {len(weight)} weights for {num_classes} classes')
    return {name: weight}


def create_task(args, model, accelerator, class_stats=None):
    """Create the task that turns a batch into a loss: DKS, distillation, or plain classification."""
    criterion = create_criterion(args, model.num_classes, class_stats).to(accelerator.device)
    common = dict(device=accelerator.device, dtype=model_dtype(args), verbose=accelerator.is_main_process)
    distillation = None
    if args.kd_model_name is not None:
        distillation = _create_distillation_task(args, model.backbone if args.dks else model, criterion, common)
    multi_label = dict(threshold=args.multilabel_threshold) if args.task == 'multilabel' else {}
    if not args.dks:
        create = tasks.MultiLabelClassificationTask if multi_label else tasks.ClassificationTask
        return distillation or create(model, criterion=criterion, **multi_label, **common)
    loss_fn = _create_dks_loss(args, criterion, num_classifiers=1 + len(model.branches))
    common.update(
        every=args.dks_every, off_epoch=args.dks_off_epoch, start_epoch=args.dks_start_epoch, ramp=args.dks_ramp,
        averaged_teacher=args.dks_teacher == 'ema', multi_label=bool(multi_label), **multi_label)
    if distillation is not None:
        return DKSDistillationTask(model, distillation, loss_fn, **common)
    return DKSTask(model, loss_fn, **common)


def _create_distillation_task(args, student, criterion, common):
    weights = dict(distill_loss_weight=args.distill_loss_weight, task_loss_weight=args.task_loss_weight)
    task, settings = dict(
        logit=(tasks.LogitDistillationTask, dict(loss_type=args.kd_loss_type, temperature=args.kd_temperature)),
        feature=(tasks.FeatureDistillationTask, dict(
            student_feature_dim=args.kd_student_feature_dim, teacher_feature_dim=args.kd_teacher_feature_dim)),
        token=(tasks.TokenDistillationTask, dict(
            distill_type=args.kd_token_distill_type, temperature=args.kd_temperature)),
    )[args.kd_distill_type]
    with naming_model(f'--kd-model-name {args.kd_model_name} with --kd-distill-type {args.kd_distill_type}'):
        return task(student, args.kd_model_name, criterion, **weights, **settings, **common)


def _create_dks_loss(args, criterion, num_classifiers):
    teacher = 'pairs' if args.dks_teacher == 'pairs' else 'ensemble'
    rows = num_classifiers if teacher == 'pairs' else 1
    for name, count in (('dks_ce_weight', num_classifiers), ('dks_synergy_weight', rows * num_classifiers)):
        values = getattr(args, name)
        if len(values) not in (1, count):
            raise OptionError(f'{flag(name)} {" ".join(map(str, values))}: {len(values)} numbers for {num_classifiers} '
                              f'classifiers; give 1, or {count}')
    ce_weight, synergy_weight = args.dks_ce_weight, args.dks_synergy_weight
    if rows > 1 and len(synergy_weight) > 1:
        synergy_weight = [synergy_weight[i:i + rows] for i in range(0, rows * rows, rows)]
    if args.dks_preset:
        settings = ', '.join(f'{name} {getattr(args, f"dks_{name}")}' for name in PRESETS[args.dks_preset])
        _logger.info(f'Preset {args.dks_preset}: {settings or "the defaults"}')
    with naming('--dks'):
        return DKSLoss(
            criterion,
            ce_weight=ce_weight if len(ce_weight) > 1 else ce_weight[0],
            synergy_weight=synergy_weight if len(synergy_weight) > 1 else synergy_weight[0],
            direction=args.dks_direction, temperature=args.dks_temperature, synergy=args.dks_synergy,
            teacher=teacher)


def create_optimizer(args, module, lr: float):
    """Create the optimizer of the module that is trained."""
    kwargs = {**optimizer_kwargs(cfg=args), 'lr': lr}
    # AssertionError: an optimizer needs a GPU; ImportError: a package; LookupError: --opt-betas are too few.
    errors = [AssertionError, ImportError, LookupError, ValueError] + [TypeError] * bool(args.opt_kwargs)
    with naming(given_flags(args, 'opt', 'opt_eps', 'opt_betas', 'opt_kwargs'), *errors):
        return create_optimizer_v2(module, **kwargs, **args.opt_kwargs)


def learning_rate(args, batch_size: float, num_processes: int) -> float:
    """Return --lr or, where it is not given, --lr-base scaled to the batch size of all processes as timm does."""
    if args.lr:
        return args.lr
    ratio = batch_size * num_processes * args.grad_accum_steps / args.lr_base_size
    scale = args.lr_base_scale or ('sqrt' if any(name in args.opt.lower() for name in ('ada', 'lamb')) else 'linear')
    return args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)
