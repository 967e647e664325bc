"""The branches that a model gets and what they cost, counted without allocating weights."""
import logging
import re
from typing import Any, Dict, List, Optional, Sequence

import timm
import torch
import torch.nn as nn
from timm.models import resolve_model_input_args

from ..errors import why
from .branches import Branch
from .meta import copy_without_weights, flop_counter
from .model import DKSModel, check_batch_fraction
from .plan import BranchBuilder
from .stages import resolve_stages
from .taps import run

__all__ = ['exit_flops', 'format_inspection', 'inspect_model', 'training_cost']

_logger = logging.getLogger(__name__)


def backbone_without_weights(model_name: str, img_size: Optional[int] = None, **timm_kwargs: Any) -> nn.Module:
    """Create the plain model of :func:`inspect_model` on the meta device."""
    size = dict(img_size=img_size) if img_size else {}
    with torch.device('meta'):
        return timm.create_model(**resolve_model_input_args(model_name, size, **timm_kwargs))


def inspect_model(
        model_name: str,
        stages: Optional[Sequence[int]] = None,
        branches: str = 'auto',
        branch_kwargs: Optional[Dict[str, Any]] = None,
        budget: Optional[float] = None,
        img_size: Optional[int] = None,
        batch_fraction: float = 1.0,
        every: int = 1,
        **timm_kwargs: Any,
) -> Dict[str, Any]:
    """Attach branches to a model on the meta device, and count.

    Args:
        model_name: See :func:`dks_timm.create_dks_model`, as for the other arguments.
        img_size: Height and width of the images in pixels; None takes the model's own.
        every: The branches run in one of so many updates.

    Returns:
        'model', 'num_classes', 'image_size' [H, W]; 'stages', a list with 'index', 'module', 'channels', 'reduction',
        'shape' [C, H, W] and 'supervised'; 'classifiers', the backbone first, with 'stage', 'kind', 'made_of',
        'blocks', 'parameters' and 'flops' (of one image's forward; a multiply-add counts as two); 'cost', the training
        forward over the plain model's in 'parameters' and 'flops', where these are a mean over updates and images.

    Raises:
        ValueError: See :meth:`dks_timm.DKSModel.from_timm`.

    Example:
        >>> from dks_timm.method.cost import inspect_model
        >>> round(inspect_model('resnet50')['cost']['flops'], 2)  # as the paper's layout costs
        2.03
    """
    check_batch_fraction(batch_fraction)
    backbone = backbone_without_weights(model_name, img_size, **timm_kwargs)
    supervised = resolve_stages(backbone, stages)
    builder = BranchBuilder(backbone, timm_kwargs, img_size)
    with torch.device(builder.device):
        built = builder.attach(supervised, branches, branch_kwargs, budget)

    last = builder.stages[-1].index
    classifiers = [_classifier(backbone, builder.flops(), last, type(backbone).__name__, '')]
    for branch in built:
        classifiers.append(_classifier(branch, builder.flops(branch), branch.stage, branch.kind, branch.reason))
    shapes = _stage_shapes(builder)
    cost = {key: sum(c[key] for c in classifiers) / classifiers[0][key] for key in ('parameters', 'flops')}
    cost['flops'] = 1 + (cost['flops'] - 1) * batch_fraction / every
    return dict(
        model=builder.template.architecture,
        num_classes=backbone.num_classes,
        image_size=list(builder.image_size),
        stages=[
            dict(
                index=s.index, module=s.module, channels=s.channels, reduction=s.reduction, shape=shape,
                supervised=s.index in supervised,
            ) for s, shape in zip(builder.stages, shapes, strict=True)],
        classifiers=classifiers,
        cost=cost,
    )


def _classifier(module: nn.Module, flops: int, stage: int, kind: str, made_of: str) -> Dict[str, Any]:
    return dict(
        stage=stage, kind=kind, made_of=made_of, blocks=_count_blocks(module),
        parameters=sum(p.numel() for p in module.parameters()), flops=flops,
    )


def _count_blocks(module: nn.Module) -> int:
    """Count the innermost numbered modules with weights and parts, such as layer4.1, stages.3.blocks.0 or s3.b1."""
    skipped = module.plan.skips if isinstance(module, Branch) and module.kind == 'tail' else {}
    found: List[str] = []
    for name, child in module.named_modules():
        numbered = re.fullmatch(r'(b|block|cell_|layer)?\d+', name.rpartition('.')[2])
        if numbered and len(list(child.children())) > 1 and any(True for _ in child.parameters()):
            if name.removeprefix('template.') not in skipped:
                found.append(name)
    return sum(not any(other.startswith(f'{name}.') for other in found) for name in found)


def _stage_shapes(builder: BranchBuilder) -> List[Optional[List[int]]]:
    try:
        features = builder.trace.model.forward_intermediates(builder.image(), intermediates_only=True)
    except RuntimeError:  # it reads the values of tensors, and the meta device has none
        features = []
    if len(features) != len(builder.stages):
        return [None] * len(builder.stages)
    return [list(f.shape[1:]) if isinstance(f, torch.Tensor) else None for f in features]


def format_inspection(found: Dict[str, Any]) -> str:
    """Format a result of :func:`inspect_model` as the tables that `dks-timm inspect` prints."""
    def table(header, rows):
        rows = [header, *([str(cell) for cell in row] for row in rows)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        return '\n'.join('  '.join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    stages = table(
        ['stage', 'module', 'channels', 'reduction', 'shape', 'supervised'],
        [(s['index'], s['module'], s['channels'], s['reduction'], 'x'.join(map(str, s['shape'] or ['?'])),
          'yes' if s['supervised'] else '') for s in found['stages']])
    whole = found['classifiers'][0]
    classifiers = table(
        ['classifier', 'stage', 'kind', 'blocks', 'parameters', 'GFLOPs', 'of backbone', 'made of'],
        [('backbone' if i == 0 else f'branch {i}', c['stage'], c['kind'], c['blocks'], f'{c["parameters"]:,}',
          f'{c["flops"] / 1e9:.3f}', f'{c["flops"] / whole["flops"]:.2f}x', c['made_of'])
         for i, c in enumerate(found['classifiers'])])
    height, width = found['image_size']
    cost = found['cost']['flops']
    whole_cost = sum(c['flops'] for c in found['classifiers']) / whole['flops']
    less = '' if cost == whole_cost else f' on average ({whole_cost:.2f}x where branches run on whole batches)'
    return (
        f'{found["model"]}, {found["num_classes"]} classes, {height}x{width} images\n\n{stages}\n\n{classifiers}\n\n'
        f'Training forward over the plain model: {cost:.2f}x FLOPs{less}, '
        f'{found["cost"]["parameters"]:.2f}x parameters. Inference: the plain model, 1.00x.'
    )


def exit_flops(net: DKSModel, input_size: Sequence[int]) -> Optional[Dict[str, Any]]:
    """Count the forward FLOPs of one image, on a copy without weights; a multiply-add counts as two.

    Args:
        net: The network.
        input_size: Of an image, (C, H, W).

    Returns:
        ``backbone``, and ``branches``: for each branch ``to_stage``, of the backbone up to it, and ``branch``, of the
        branch alone. None for models that do not run without weights.
    """
    net = copy_without_weights(net)
    image = torch.zeros(1, *input_size, device='meta')
    features, to_stage, of_branch = {}, {}, []

    def note(source, output):
        features[source], to_stage[source] = output, counter.get_total_flops()

    with flop_counter(net) as counter:
        try:
            run(net.backbone, image, note)
        except RuntimeError as e:  # it reads the values of tensors
            _logger.info(f'What an exit costs is not known, as the model does not run without weights: {why(e)}')
            return None
        whole = total = counter.get_total_flops()
        for branch in net.branches:
            branch(image, features[branch.source])
            of_branch.append(counter.get_total_flops() - total)
            total = counter.get_total_flops()
    branches = [dict(to_stage=to_stage[b.source], branch=n) for b, n in zip(net.branches, of_branch, strict=True)]
    return dict(backbone=whole, branches=branches)


def training_cost(net: DKSModel, in_chans: int = 3) -> Optional[float]:
    """Return the forward FLOPs of training over those of the backbone, counted on a copy without weights.

    Args:
        net: Made by :meth:`DKSModel.from_timm`. Its ``batch_fraction`` counts.
        in_chans: Channels of its images.

    Returns:
        None for models that do not run without weights.
    """
    flops = exit_flops(net, (in_chans, *net.layout['image_size']))
    if flops is None:
        return None
    whole = flops['backbone'] + sum(branch['branch'] for branch in flops['branches'])
    return 1 + (whole / flops['backbone'] - 1) * net.batch_fraction
