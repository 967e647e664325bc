"""From flags to model, task and learning rate, each as timm's trainer makes it."""
import logging
from copy import deepcopy
from functools import partial

import timm
import torch
from timm import task as tasks
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.loss import create_classification_loss
from timm.models import NaFlexVit, resolve_model_input_args
from timm.optim import create_optimizer_v2, get_optimizer_class, optimizer_kwargs

from ..errors import OptionError, closest, flag, naming
from ..method.cost import exit_flops, training_cost
from ..method.create import add_branches
from ..method.loss import DKSLoss
from ..method.plan import run_bare
from ..method.task import DKSDistillationTask, DKSTask
from .checks import mixup_active
from .data import model_dtype

_logger = logging.getLogger(__name__)


def check_model_name(name: str, flag: str = 'MODEL') -> None:
    """Refuse a model that timm does not have."""
    if ':' not in name and not timm.is_model(name.partition('.')[0]):
        raise OptionError(f'{flag} {name}: timm has no such model{closest(name, timm.list_models())}')
    with naming(f'{flag} {name}', Exception, without=lambda: _architecture('resnet18')):
        _architecture(name)


def _architecture(name: str) -> str:
    """Name of the architecture of a model, from its config.json where that is published."""
    return resolve_model_input_args(name)['model_name']


def naming_model(subject: str, name: str):
    """Name a model in what timm raises about it, where its architecture without further settings works."""
    return naming(subject, Exception, without=lambda: run_bare(_architecture(name)))


def check_names(args) -> None:
    """Refuse a model or an optimizer that timm does not have, and a compiler that torch does not have."""
    check_model_name(args.model, '--model')
    if args.kd_model_name is not None:
        check_model_name(args.kd_model_name, '--kd-model-name')
    optimizer = args.opt.lower().removeprefix('lookahead_')
    with naming(f'--opt {args.opt}', AssertionError, ImportError):  # of one that needs a GPU or another package
        try:
            get_optimizer_class(optimizer)
        except ValueError:
            names = timm.optim.list_optimizers()
            raise OptionError(f'--opt {args.opt}: timm has no such optimizer{closest(optimizer, names)}') from None
    if args.torchcompile:
        mode = f' --torchcompile-mode {args.torchcompile_mode}' if args.torchcompile_mode else ''
        with naming(f'--torchcompile {args.torchcompile}{mode}', RuntimeError):
            torch.compile(lambda: None, backend=args.torchcompile, mode=args.torchcompile_mode)  # looked up, not run


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
    with naming_model(subject, args.model):
        model = timm.create_model(args.model, **kwargs)
    if not hasattr(model, 'get_classifier'):
        raise OptionError(f'{subject}: has no classifier to train')
    if args.dks:
        with naming(subject):
            model = add_branches(
                model,
                args.model,
                args.pretrained,
                {k: v for k, v in kwargs.items() if k != 'pretrained'},
                layout=dict(
                    stages=args.dks_stages,
                    branches=args.dks_branches,
                    branch_kwargs=args.dks_branch_kwargs,
                    budget=args.dks_budget,
                    image_size=image_size,
                ),
                batch_fraction=args.dks_batch_fraction,
            )
        _logger.info(model.describe())
        if args.dks_batch_fraction < 1 or args.dks_every > 1:
            cost = training_cost(model, kwargs['in_chans'])
            if cost is not None:
                _logger.info(
                    f'Training forward, on average: {1 + (cost - 1) / args.dks_every:.2f}x the FLOPs of the backbone.')

    _set_heads(args, model)
    if args.grad_checkpointing:
        subject = f'--grad-checkpointing with --model {args.model}'
        if not hasattr(model, 'set_grad_checkpointing'):
            raise OptionError(f'{subject}: cannot recompute activations; leave the flag out')
        with naming(subject, AssertionError):  # timm's word for a model that cannot
            model.set_grad_checkpointing(enable=True)
    if args.naflex_loader and not isinstance(model, NaFlexVit):
        raise OptionError(f'--naflex-loader: --model {args.model} does not take patch sequences; use a naflexvit model')
    return model


def _set_heads(args, model):
    """Scale and bias the classifiers as --head-init-scale and --head-init-bias say."""
    for name in ('head_init_scale', 'head_init_bias'):
        value = getattr(args, name)
        if value is None:
            continue
        heads = model.get_classifiers() if args.dks else model.get_classifier()
        for head in heads if isinstance(heads, (list, tuple)) else [heads]:
            weight, bias = getattr(head, 'weight', None), getattr(head, 'bias', None)
            if bias is None or weight is None:
                raise OptionError(f'{flag(name)} {value}: the classifier of --model {args.model} has no '
                                  'weight and bias of its own; leave the flag out')
            with torch.no_grad():
                if name == 'head_init_bias':
                    bias.fill_(value)
                else:
                    weight.mul_(value)
                    bias.mul_(value)


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
    channels = input_size[0]
    model.eval()
    with torch.no_grad():
        for size in [input_size[1:], *((size, size) for size in args.train_img_sizes or ())]:
            subject = f'{_subject(args)}: input size {(channels, *size)}'
            with naming_model(subject, args.model):
                model(torch.zeros(1, channels, *size))
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
    subject = f'--kd-model-name {args.kd_model_name}'
    with naming_model(subject, args.kd_model_name):
        teacher = timm.create_model(
            args.kd_model_name,
            pretrained=True,
            num_classes=student.num_classes,
            in_chans=student.in_chans,
            device=common['device'],
            dtype=common['dtype'],
        )
    if args.kd_distill_type == 'token' and not hasattr(student, 'set_distilled_training'):
        raise OptionError(
            f'--kd-distill-type token: --model {args.model} has no distillation token; use logit or feature')
    common = dict(
        student_model=student,
        teacher_model=teacher,
        criterion=criterion,
        distill_loss_weight=args.distill_loss_weight,
        task_loss_weight=args.task_loss_weight,
        **common,
    )
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


def create_optimizer(args, module):
    """Create the optimizer of the module that is trained."""
    kwargs = optimizer_kwargs(cfg=args)
    of_any = {k: v for k, v in kwargs.items() if k not in ('momentum', 'eps', 'betas', 'foreach')}
    with naming(f'--opt {args.opt}', Exception, without=partial(create_optimizer_v2, module, **of_any)):
        return create_optimizer_v2(module, **kwargs, **args.opt_kwargs)


def set_learning_rate(args, batch_size: float) -> None:
    """Where --lr is not given, scale --lr-base to the global batch size as timm does."""
    if args.lr:
        return
    ratio = batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
    if not args.lr_base_scale:
        args.lr_base_scale = 'sqrt' if any(name in args.opt.lower() for name in ('ada', 'lamb')) else 'linear'
    args.lr = args.lr_base * (ratio ** 0.5 if args.lr_base_scale == 'sqrt' else ratio)
