"""Early exits: how often heads agree, how accurate leaving at an early one is, and what it costs."""
import logging
from collections import OrderedDict
from itertools import combinations
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..errors import why
from .model import DKSModel
from .plan import copy_without_weights

__all__ = ['THRESHOLDS', 'HeadCounts', 'exit_flops']

_logger = logging.getLogger(__name__)

# Confidences from which on an image leaves at a branch; 0 is all of them.
THRESHOLDS = (0., 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)


class HeadCounts:
    """Counts over the images of an evaluation, kept on the device until they are asked for.

    Args:
        names: Names of the classifiers, the backbone's first.
        device: Device of the logits.
        max_samples: Images to count, as in timm's evaluators: those beyond it are padding of a sampler.
    """

    def __init__(self, names: Sequence[str], device: torch.device, max_samples: Optional[int] = None):
        self.names = tuple(names)
        self.max_samples = max_samples
        self.seen = 0
        # In single precision as the logits, as a threshold in double precision may lie between two of its numbers.
        self.thresholds = torch.tensor(THRESHOLDS, device=device)
        heads, branches = len(self.names), len(self.names) - 1
        self.sizes = [heads ** 2, branches * len(THRESHOLDS), branches * len(THRESHOLDS)]
        self.counts = torch.zeros(sum(self.sizes), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, logits: Sequence[torch.Tensor], target: torch.Tensor) -> None:
        """Count a batch.

        Args:
            logits: Of each classifier (B, num_classes).
            target: Class indices (B,).
        """
        z = torch.stack([z.float() for z in logits])  # (M, B, C)
        if self.max_samples is not None:
            count = max(0, self.max_samples - self.seen)
            z, target = z[:, :count], target[:count]
        self.seen += len(target)
        predicted = z.argmax(dim=-1)
        agree = (predicted[:, None] == predicted).sum(dim=-1)  # (M, M); the diagonal counts the images

        right = predicted == target
        leave = z[1:].softmax(dim=-1).amax(dim=-1)[..., None] >= self.thresholds  # (M - 1, B, T)
        left_right = torch.where(leave, right[1:, :, None], right[0, :, None])
        self.counts += torch.cat([agree.flatten(), leave.sum(dim=1).flatten(), left_right.sum(dim=1).flatten()])

    def compute(self, distributed: bool = False) -> Tuple[Dict[str, float], List[Dict[str, Any]]]:
        """What was counted, in this process or in all, in percent of the images.

        Returns:
            ``agree_<a>_<b>`` for each pair of classifiers; and for each branch and threshold a row with ``exit`` (the
            branch's name), ``threshold``, ``leave`` (images whose confidence there reaches the threshold) and ``top1``
            (accuracy where the backbone answers for the rest).
        """
        counts = self.counts.clone()
        if distributed:
            torch.distributed.all_reduce(counts)
        agree, leave, right = (part.tolist() for part in counts.split(self.sizes))
        percent = 100 / max(1, agree[0])
        heads = len(self.names)
        agreement = OrderedDict(
            (f'agree_{self.names[a]}_{self.names[b]}', percent * agree[a * heads + b])
            for a, b in combinations(range(heads), 2))
        places = [(name, threshold) for name in self.names[1:] for threshold in THRESHOLDS]
        return agreement, [
            dict(exit=name, threshold=threshold, leave=percent * left, top1=percent * correct)
            for (name, threshold), left, correct in zip(places, leave, right, strict=True)]


class _Stop(Exception):
    pass


def exit_flops(net: DKSModel, input_size: Sequence[int]) -> Optional[Dict[str, Any]]:
    """Forward FLOPs of one image, counted on a copy without weights; a multiply-add counts as two.

    Args:
        net: The network.
        input_size: Of an image, (C, H, W).

    Returns:
        ``backbone``, and ``branches``: for each branch ``to_stage``, of the backbone up to it, and ``branch``, of the
        branch alone. None for models that do not run without weights.
    """
    net = copy_without_weights(net).eval().requires_grad_(False)
    image = torch.zeros(1, *input_size, device='meta')
    try:
        with FlopCounterMode(display=False) as counter:
            net.backbone(image)
        return dict(backbone=counter.get_total_flops(), branches=[_branch_flops(net, b, image) for b in net.branches])
    except RuntimeError as e:  # it reads the values of tensors
        _logger.info(f'What an exit costs is not known, as the model does not run without weights: {why(e)}')
        return None


def _branch_flops(net, branch, image):
    flops = []

    def run_branch(module, args, output):
        flops.append(counter.get_total_flops())
        branch(image, output)
        raise _Stop

    handle = net.backbone.get_submodule(branch.source).register_forward_hook(run_branch)
    try:
        with FlopCounterMode(display=False) as counter:
            net.backbone(image)
    except _Stop:
        pass
    finally:
        handle.remove()
    return dict(to_stage=flops[0], branch=counter.get_total_flops() - flops[0])
