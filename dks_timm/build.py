"""From flags to model, task and learning rate, each as timm's trainer makes it."""
import logging
from copy import deepcopy

import timm
import torch
from timm import task as tasks
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.loss import create_classification_loss
from timm.models import NaFlexVit
from timm.optim import get_optimizer_info

from .checks import mixup_active
from .data import model_dtype
from .errors import UNREADABLE, OptionError, closest, flag, naming
from .exits import exit_flops
from .inspection import training_cost
from .loss import DKSLoss
from .model import create_dks_model
from .task import DKSDistillationTask, DKSTask

_logger = logging.getLogger(__name__)


def check_model_name(name: str, flag: str = 'MODEL') -> None:
    """Refuse a model that timm does not have."""
    if ':' not in name and not timm.is_model(name.partition('.')[0]):
        raise OptionError(f'{flag} {name}: timm has no such model{closest(name, timm.list_models())}')


def check_names(args) -> None:
    """Refuse a model or an optimizer that timm does not have."""
    check_model_name(args.model, '--model')
    if args.kd_model_name is not None:
        check_model_name(args.kd_model_name, '--kd-model-name')
    optimizer = args.opt.lower().removeprefix('lookahead_')
    try:
        get_optimizer_info(optimizer)
    except ValueError:
        names = timm.optim.list_optimizers()
        raise OptionError(f'--opt {args.opt}: timm has no such optimizer{closest(optimizer, names)}') from None


def create_model(args):
    """Create the model that the flags describe; with --dks a DKSModel around it."""
    kwargs = dict(
        pretrained=args.pretrained,
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
    for name in set(kwargs) & set(args.model_kwargs):
        raise OptionError(f'--model-kwargs {name}={args.model_kwargs[name]}: train.py has a flag of its own for it')
    kwargs.update(args.model_kwargs)
    if args.pretrained_path:
        kwargs['pretrained_cfg_overlay'] = dict(file=args.pretrained_path, num_classes=-1)  # -1 adapts the classifier
    image_size = tuple(args.input_size[1:]) if args.input_size else args.img_size and (args.img_size, args.img_size)
    subject = _subject(args)
    if args.initial_checkpoint:
        subject += f' with --initial-checkpoint {args.initial_checkpoint}, which should hold its weights'
    if args.pretrained_path:
        subject += f' with --pretrained-path {args.pretrained_path}, which should hold its weights'
    with naming(subject, AssertionError, *UNREADABLE):
        if args.dks:
            model = create_dks_model(
                args.model,
                stages=args.dks_stages,
                branches=args.dks_branches,
                branch_kwargs=args.dks_branch_kwargs,
                budget=args.dks_budget,
                image_size=image_size,
                batch_fraction=args.dks_batch_fraction,
                **kwargs,
            )
            _logger.info(model.describe())
            if args.dks_batch_fraction < 1 or args.dks_every > 1:
                cost = training_cost(model, kwargs['in_chans'])
                if cost is not None:
                    _logger.info(
                        f'Training forward, on average: {1 + (cost - 1) / args.dks_every:.2f}x the FLOPs of the '
                        'backbone.')
        else:
            model = timm.create_model(args.model, **kwargs)

    heads = model.get_classifiers() if args.dks else model.get_classifier()
    for head in heads if isinstance(heads, (list, tuple)) else [heads]:
        with torch.no_grad(), naming(f'--head-init-scale, --head-init-bias with --model {args.model}', AttributeError):
            if args.head_init_scale is not None:
                head.weight.mul_(args.head_init_scale)
                head.bias.mul_(args.head_init_scale)
            if args.head_init_bias is not None:
                head.bias.fill_(args.head_init_bias)
    if args.grad_checkpointing:
        with naming(f'--grad-checkpointing with --model {args.model}', AssertionError, AttributeError):
            model.set_grad_checkpointing(enable=True)
    if args.naflex_loader and not isinstance(model, NaFlexVit):
        raise OptionError(f'--naflex-loader: --model {args.model} does not take patch sequences; use a naflexvit model')
    return model


def _subject(args) -> str:
    """What a complaint about the model begins with."""
    given = {name: getattr(args, name) for name in ('model', 'model_kwargs', 'gp')}
    return ' with '.join(f'{flag(name)} {value}' for name, value in given.items() if value not in (None, {}))


def place_model(args, model, input_size, device):
    """Move the model to its device, dtype and layout, with the BatchNorm that the flags ask for."""
    if args.dks and args.rank == 0:
        args.exit_flops = exit_flops(model, input_size)  # a checkpoint carries it, for reports
    if not args.naflex_loader:
        _check_input_size(args, model, input_size)
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    _check_batch_norm(args, model, input_size)
    model.to(device=device, dtype=model_dtype(args))
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.distributed and args.sync_bn:
        args.dist_bn = ''  # no statistics are left to distribute
        model = convert_sync_batchnorm(model)
    return model


def _check_input_size(args, model, input_size):
    """Refuse images that the model does not take, by one that it evaluates."""
    model.eval()
    for height, width in [input_size[1:], *((size, size) for size in args.train_img_sizes or ())]:
        size = (input_size[0], height, width)
        with naming(f'{_subject(args)}: input size {size}', Exception), torch.no_grad():
            model(torch.zeros(1, *size))
    model.train()


def _check_batch_norm(args, model, input_size):
    """Refuse single images where BatchNorm, in training, gets one number a channel, and nothing to take a mean of."""
    smallest = min([args.batch_size, *(args.train_batch_sizes or [])])
    if smallest > 1 or args.naflex_loader or args.distributed and args.sync_bn:
        return
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            deepcopy(model)(torch.zeros(max(args.aug_splits, 1), *input_size))
    except ValueError as e:
        if 'more than 1 value per channel' not in str(e):
            raise
        name = '--batch-size' if args.batch_size == 1 else '--train-batch-sizes'
        raise OptionError(
            f'{name} 1: in --model {args.model}, BatchNorm cannot train on one image of '
            f'{input_size[1]} x {input_size[2]} at a time; give more images or larger ones'
        ) from None


def create_criterion(args):
    """Create the loss of one classifier."""
    soft_targets = mixup_active(args)
    if args.jsd_loss:
        return create_classification_loss('jsd', smoothing=args.smoothing, jsd_splits=args.aug_splits)
    if args.bce_loss and (soft_targets or args.smoothing):  # timm's script takes cross-entropy where there is neither
        return create_classification_loss(
            'bce',
            smoothing=args.smoothing,
            soft_targets=soft_targets,
            pos_weight=args.bce_pos_weight,
            bce_target_thresh=args.bce_target_thresh,
            bce_sum=args.bce_sum,
        )
    return create_classification_loss('ce', smoothing=args.smoothing, soft_targets=soft_targets)


def create_task(args, model, device):
    """Create the task that turns a batch into a loss: DKS, distillation, or plain classification."""
    criterion = create_criterion(args).to(device)
    common = dict(device=device, dtype=model_dtype(args), verbose=args.rank == 0)
    if args.dks:
        loss_fn = _create_dks_loss(args, criterion, num_classifiers=1 + len(model.branches))
        when = dict(every=args.dks_every, start_epoch=args.dks_start_epoch)
    if args.kd_model_name is None:
        if args.dks:
            return DKSTask(model, loss_fn, **common, **when)
        return tasks.ClassificationTask(model, criterion=criterion, **common)
    task = _create_distillation_task(args, model.backbone if args.dks else model, criterion, common)
    return DKSDistillationTask(model, task, loss_fn, **common, **when) if args.dks else task


def _create_distillation_task(args, student, criterion, common):
    common = dict(
        student_model=student,
        teacher_model=args.kd_model_name,
        criterion=criterion,
        distill_loss_weight=args.distill_loss_weight,
        task_loss_weight=args.task_loss_weight,
        **common,
    )
    with naming(f'--kd-model-name {args.kd_model_name}', *UNREADABLE):
        if args.kd_distill_type == 'feature':
            return tasks.FeatureDistillationTask(
                student_feature_dim=args.kd_student_feature_dim,
                teacher_feature_dim=args.kd_teacher_feature_dim,
                **common,
            )
        if args.kd_distill_type == 'token':
            return tasks.TokenDistillationTask(
                distill_type=args.kd_token_distill_type, temperature=args.kd_temperature, **common)
        return tasks.LogitDistillationTask(loss_type=args.kd_loss_type, temperature=args.kd_temperature, **common)


def _create_dks_loss(args, criterion, num_classifiers):
    ce_weight, synergy_weight = args.dks_ce_weight, args.dks_synergy_weight
    for name, values, count, what in (
            ('ce', ce_weight, num_classifiers, 'one for each classifier'),
            ('synergy', synergy_weight, num_classifiers ** 2, 'a matrix, row by row'),
    ):
        if len(values) not in (1, count):
            raise OptionError(
                f'--dks-{name}-weight {" ".join(map(str, values))}: {len(values)} numbers for {num_classifiers} '
                f'classifiers; give 1, or {count} ({what})'
            )
    matrix = [synergy_weight[i:i + num_classifiers] for i in range(0, len(synergy_weight), num_classifiers)]
    return DKSLoss(
        criterion,
        ce_weight=ce_weight if len(ce_weight) > 1 else ce_weight[0],
        synergy_weight=matrix if len(synergy_weight) > 1 else synergy_weight[0],
        direction=args.dks_direction,
        temperature=args.dks_temperature,
    )


def set_learning_rate(args, batch_size: float) -> None:
    """Where --lr is not given, scale --lr-base to the global batch size as timm does."""
    if args.lr:
        return
    ratio = batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
    if not args.lr_base_scale:
        args.lr_base_scale = 'sqrt' if any(name in args.opt.lower() for name in ('ada', 'lamb')) else 'linear'
    args.lr = args.lr_base * (ratio ** 0.5 if args.lr_base_scale == 'sqrt' else ratio)
