"""From the configuration to model, task, optimizer and learning rate, each as timm's train.py makes it."""
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
from ..method.cost import training_cost
from ..method.create import add_branches
from ..method.loss import DKSLoss
from ..method.plan import run_bare
from ..method.task import DKSDistillationTask, DKSTask
from .config import mixup_active
from .data import model_dtype

_logger = logging.getLogger(__name__)


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
            hint = closest(optimizer, timm.optim.list_optimizers())
            raise OptionError(f'--opt {args.opt}: timm has no such optimizer{hint}') from None
    if args.torchcompile:
        mode = f' --torchcompile-mode {args.torchcompile_mode}' if args.torchcompile_mode else ''
        with naming(f'--torchcompile {args.torchcompile}{mode}', RuntimeError):
            torch.compile(lambda: None, backend=args.torchcompile, mode=args.torchcompile_mode)  # looked up, not run


def check_model_name(name: str, flag: str = 'MODEL') -> None:
    """Refuse a model that timm does not have."""
    if ':' not in name and not timm.is_model(name.partition('.')[0]):
        raise OptionError(f'{flag} {name}: timm has no such model{closest(name, timm.list_models())}')
    with naming(f'{flag} {name}', Exception, without=lambda: _architecture('resnet18')):
        _architecture(name)


def _architecture(name):
    """Return the architecture of a model: the name itself, or what its published config.json says."""
    return resolve_model_input_args(name)['model_name']


def naming_model(subject: str, name: str):
    """Name a model in what timm raises about it, if its architecture works without further settings."""
    return naming(subject, Exception, without=lambda: run_bare(_architecture(name)))


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
    subject = _subject(args)
    for name in ('initial_checkpoint', 'pretrained_path'):
        if getattr(args, name):
            subject += f' with {flag(name)} {getattr(args, name)}, which should hold its weights'
    with naming_model(subject, args.model):
        model = timm.create_model(args.model, **kwargs)
    if not hasattr(model, 'get_classifier'):
        raise OptionError(f'{subject}: has no classifier to train')
    if args.dks:
        with naming(subject):
            model = _add_branches(args, model, kwargs)
    _set_heads(args, model)
    if args.grad_checkpointing:
        subject = f'--grad-checkpointing with --model {args.model}'
        if not hasattr(model, 'set_grad_checkpointing'):
            raise OptionError(f'{subject}: cannot recompute activations; leave the flag out')
        with naming(subject, AssertionError):  # which timm raises for a model that cannot
            model.set_grad_checkpointing(enable=True)
    if args.naflex_loader and not isinstance(model, NaFlexVit):
        raise OptionError(f'--naflex-loader: --model {args.model} does not take patch sequences; use a naflexvit model')
    return model


def _add_branches(args, backbone, kwargs):
    image_size = tuple(args.input_size[1:]) if args.input_size else args.img_size and (args.img_size, args.img_size)
    model = add_branches(
        backbone,
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
        cost = training_cost(model, args.dks_every)
        _logger.info(f'Training forward, on average: {cost:.2f}x the FLOPs of the backbone.')
    return model


def _set_heads(args, model):
    """Scale and bias the classifiers as --head-init-scale and --head-init-bias say."""
    scale, bias = args.head_init_scale, args.head_init_bias
    if scale is None and bias is None:
        return
    heads = model.get_classifiers() if args.dks else model.get_classifier()
    for head in heads if isinstance(heads, (list, tuple)) else [heads]:
        if getattr(head, 'weight', None) is None or getattr(head, 'bias', None) is None:
            given = f'--head-init-bias {bias}' if scale is None else f'--head-init-scale {scale}'
            raise OptionError(f'{given}: the classifier of --model {args.model} has no weight and bias of its own; '
                              'leave the flag out')
        with torch.no_grad():
            if scale is not None:
                head.weight.mul_(scale)
                head.bias.mul_(scale)
            if bias is not None:
                head.bias.fill_(bias)


def _subject(args):
    """Return the flags that a complaint about the model begins with."""
    given = {name: getattr(args, name) for name in ('model', 'model_kwargs', 'gp')}
    return ' with '.join(f'{flag(name)} {value}' for name, value in given.items() if value not in (None, {}))


def place_model(args, model, input_size, accelerator):
    """Move the model to its device, dtype and layout, with the BatchNorm that the flags ask for.

    Args:
        args: The configuration.
        model: From :func:`create_model`.
        input_size: (C, H, W) of its images.
        accelerator: Its ``device`` and ``num_processes`` count.

    Raises:
        OptionError: if the model does not take such images, or BatchNorm cannot train on batches of one.
    """
    synced = args.sync_bn and accelerator.num_processes > 1
    if not args.naflex_loader:
        _check_input_size(args, model, input_size)
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    if not (args.naflex_loader or synced):
        _check_batch_norm(args, model, input_size)
    model.to(device=accelerator.device, dtype=model_dtype(args))
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    return convert_sync_batchnorm(model) if synced else model


def _check_input_size(args, model, input_size):
    """Refuse images that the model does not take, by evaluating one."""
    channels = input_size[0]
    model.eval()
    with torch.no_grad():
        for size in [input_size[1:], *((size, size) for size in args.train_img_sizes or ())]:
            with naming_model(f'{_subject(args)}: input size {(channels, *size)}', args.model):
                model(torch.zeros(1, channels, *size))
    model.train()


def _check_batch_norm(args, model, input_size):
    """Refuse batches of one image where BatchNorm would get a single number per channel."""
    if min([args.batch_size, *(args.train_batch_sizes or [])]) > 1:
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


def create_task(args, model, accelerator):
    """Create the task that turns a batch into a loss: DKS, distillation, or plain classification."""
    criterion = create_criterion(args).to(accelerator.device)
    common = dict(device=accelerator.device, dtype=model_dtype(args), verbose=accelerator.is_main_process)
    distillation = None
    if args.kd_model_name is not None:
        distillation = _create_distillation_task(args, model.backbone if args.dks else model, criterion, common)
    if not args.dks:
        return distillation or tasks.ClassificationTask(model, criterion=criterion, **common)
    loss_fn = _create_dks_loss(args, criterion, num_classifiers=1 + len(model.branches))
    common.update(every=args.dks_every, start_epoch=args.dks_start_epoch)
    if distillation is not None:
        return DKSDistillationTask(model, distillation, loss_fn, **common)
    return DKSTask(model, loss_fn, **common)


def _create_distillation_task(args, student, criterion, common):
    with naming_model(f'--kd-model-name {args.kd_model_name}', args.kd_model_name):
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
    task, settings = dict(
        logit=(tasks.LogitDistillationTask, dict(loss_type=args.kd_loss_type, temperature=args.kd_temperature)),
        feature=(tasks.FeatureDistillationTask, dict(
            student_feature_dim=args.kd_student_feature_dim, teacher_feature_dim=args.kd_teacher_feature_dim)),
        token=(tasks.TokenDistillationTask, dict(
            distill_type=args.kd_token_distill_type, temperature=args.kd_temperature)),
    )[args.kd_distill_type]
    return task(
        student_model=student,
        teacher_model=teacher,
        criterion=criterion,
        distill_loss_weight=args.distill_loss_weight,
        task_loss_weight=args.task_loss_weight,
        **common,
        **settings,
    )


def _create_dks_loss(args, criterion, num_classifiers):
    for name, count in (('dks_ce_weight', num_classifiers), ('dks_synergy_weight', num_classifiers ** 2)):
        values = getattr(args, name)
        if len(values) not in (1, count):
            raise OptionError(f'{flag(name)} {" ".join(map(str, values))}: {len(values)} numbers for {num_classifiers} '
                              f'classifiers; give 1, or {count}')
    ce_weight, synergy_weight = args.dks_ce_weight, args.dks_synergy_weight
    matrix = [synergy_weight[i:i + num_classifiers] for i in range(0, len(synergy_weight), num_classifiers)]
    return DKSLoss(
        criterion,
        ce_weight=ce_weight if len(ce_weight) > 1 else ce_weight[0],
        synergy_weight=matrix if len(synergy_weight) > 1 else synergy_weight[0],
        direction=args.dks_direction,
        temperature=args.dks_temperature,
    )


def create_optimizer(args, module, lr: float):
    """Create the optimizer of the module that is trained."""
    kwargs = {**optimizer_kwargs(cfg=args), 'lr': lr}
    of_any = {k: v for k, v in kwargs.items() if k not in ('momentum', 'eps', 'betas', 'foreach')}
    with naming(f'--opt {args.opt}', Exception, without=partial(create_optimizer_v2, module, **of_any)):
        return create_optimizer_v2(module, **kwargs, **args.opt_kwargs)


def learning_rate(args, batch_size: float, num_processes: int) -> float:
    """Return --lr or, where it is not given, --lr-base scaled to the global batch size as timm does.

    Args:
        args: The configuration.
        batch_size: Images of a batch of one process.
        num_processes: Processes that train together.
    """
    if args.lr:
        return args.lr
    ratio = batch_size * num_processes * args.grad_accum_steps / args.lr_base_size
    scale = args.lr_base_scale or ('sqrt' if any(name in args.opt.lower() for name in ('ada', 'lamb')) else 'linear')
    return args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)
