"""The branches that a model gets and what they cost, counted without allocating weights."""
from typing import Any, Dict, Optional, Sequence

import timm
import torch
import torch.nn as nn
from timm.models import resolve_model_input_args

from .model import DKSModel, format_table, run
from .stages import list_stages
from .trace import copy_without_weights, flop_counter


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
        share: float = 1.,
        **timm_kwargs: Any,
) -> Dict[str, Any]:
    """Attach branches to a model on the meta device, and count.

    Args:
        model_name: See :func:`dks_timm.create_dks_model`, as for the other arguments.
        img_size: Height and width of the images in pixels; None takes the model's own.
        share: The branches run in this share of the updates.

    Returns:
        'model', 'num_classes', 'image_size' [H, W]; 'stages', a list with 'index', 'module', 'channels', 'reduction'
        and 'supervised'; 'classifiers', the backbone first, with 'stage', 'kind', 'made_of', 'parameters' and 'flops'
        (of one image's forward; a multiply-add counts as two); 'cost', the training forward over the plain model's in
        'parameters' and 'flops', where these are a mean over updates and images.

    Raises ValueError as :meth:`dks_timm.DKSModel.from_timm`.
    """
    backbone = backbone_without_weights(model_name, img_size, **timm_kwargs)
    with torch.device('meta'):
        net = DKSModel.from_timm(
            backbone, stages, branches, timm_kwargs, branch_kwargs, budget, img_size, batch_fraction)
    flops = exit_flops(net, net.input_size)
    all_stages = list_stages(backbone)
    rows = [(backbone, all_stages[-1].index, type(backbone).__name__, '', flops['backbone'])]
    rows += [(b, b.stage, b.kind, b.reason, f['branch']) for b, f in zip(net.branches, flops['branches'], strict=True)]
    classifiers = [
        dict(stage=stage, kind=kind, made_of=made_of, parameters=sum(p.numel() for p in module.parameters()), flops=n)
        for module, stage, kind, made_of, n in rows]
    return dict(
        model=backbone.pretrained_cfg['architecture'],
        num_classes=backbone.num_classes,
        image_size=net.layout['image_size'],
        stages=[dict(vars(stage), supervised=stage.index in net.stages) for stage in all_stages],
        classifiers=classifiers,
        cost=dict(
            parameters=sum(c['parameters'] for c in classifiers) / classifiers[0]['parameters'],
            flops=1 + batch_fraction * share * sum(c['flops'] for c in classifiers[1:]) / classifiers[0]['flops'],
        ),
    )


def format_inspection(found: Dict[str, Any]) -> str:
    """Format a result of :func:`inspect_model` as the tables that `dks-timm inspect` prints."""
    stages = format_table(
        ('stage', 'module', 'channels', 'reduction', 'supervised'),
        [(*list(s.values())[:-1], 'yes' if s['supervised'] else '') for s in found['stages']])
    whole = found['classifiers'][0]
    classifiers = format_table(
        ('classifier', 'stage', 'kind', 'parameters', 'GFLOPs', 'of backbone', 'made of'),
        [(f'branch {i}' if i else 'backbone', c['stage'], c['kind'], f'{c["parameters"]:,}', f'{c["flops"] / 1e9:.3f}',
          f'{c["flops"] / whole["flops"]:.2f}x', c['made_of']) for i, c in enumerate(found['classifiers'])])
    height, width = found['image_size']
    cost = found['cost']['flops']
    whole_cost = 1 + sum(c['flops'] for c in found['classifiers'][1:]) / whole['flops']
    less = '' if cost == whole_cost else f' on average ({whole_cost:.2f}x where branches run on whole batches)'
    return (
        f'{found["model"]}, {found["num_classes"]} classes, {height}x{width} images\n\n{stages}\n\n{classifiers}\n\n'
        f'Training forward over the plain model: {cost:.2f}x FLOPs{less}, '
        f'{found["cost"]["parameters"]:.2f}x parameters. Inference: the plain model, 1.00x.'
    )


def exit_flops(net: DKSModel, input_size: Sequence[int]) -> Dict[str, Any]:
    """Count the forward FLOPs of one image (C, H, W), on a copy without weights; a multiply-add counts as two.

    Returns ``backbone``, and ``branches``: for each branch ``to_stage``, of the backbone up to it, and ``branch``, of
    the branch alone.
    """
    net = copy_without_weights(net)
    image = torch.zeros(1, *input_size, device='meta')
    features, to_stage, branches = {}, {}, []

    def note(source, output):
        features[source], to_stage[source] = output, counter.get_total_flops()

    counter = flop_counter(net)
    net.exits(image)  # puts hooks back that pruning has removed; tails plan for this size, which is not to be counted
    with counter:
        run(net.backbone, image, note)
        whole = counter.get_total_flops()
        for branch in net.branches:
            before = counter.get_total_flops()
            branch(image, features[branch.source])
            branches.append(dict(to_stage=to_stage[branch.source], branch=counter.get_total_flops() - before))
    return dict(backbone=whole, branches=branches)


def mean_exit_cost(flops: Dict[str, Any], branch: int, leave: float) -> float:
    """Return the mean cost of an image that a branch is asked about, over that of the backbone alone.

    Every image pays for the branch, one that stays for the rest of the backbone, too.

    Args:
        flops: From :func:`exit_flops`.
        branch: Index of the branch.
        leave: Share of the images that leave there, 0 to 1.
    """
    to_stage, own = flops['branches'][branch]['to_stage'], flops['branches'][branch]['branch']
    return (to_stage + own + (1 - leave) * (flops['backbone'] - to_stage)) / flops['backbone']


def training_cost(net: DKSModel, share: float = 1.) -> float:
    """Return the forward FLOPs of training over those of the backbone, a mean over images and updates.

    The branches run in a share of the updates, on the network's ``batch_fraction``.
    """
    flops = exit_flops(net, net.input_size)
    return 1 + net.batch_fraction * share * sum(branch['branch'] for branch in flops['branches']) / flops['backbone']
