"""The network of a checkpoint, made again by what the checkpoint says of its run."""
import argparse
from pathlib import Path
from typing import Any, Union

import torch
from timm.models import load_checkpoint
from timm.utils import load_checkpoint_metadata

from ..errors import UNREADABLE, InputError, naming
from ..method.create import load_branches, plain_tensors
from ..method.model import DKSModel, prune
from .build import check_model_name, create_model
from .config import check_types, create_parser


def read_checkpoint(checkpoint: Union[str, Path]) -> Any:
    """Return what a checkpoint holds, its tensors memory-mapped where it can be, without running code of it."""
    with naming(f'checkpoint {str(checkpoint)!r} cannot be read', *UNREADABLE):
        try:
            return load_checkpoint_metadata(str(checkpoint))
        except RuntimeError as e:
            if 'mmap can only be used' not in str(e):
                raise
            with torch.serialization.safe_globals([argparse.Namespace]):  # as timm does
                return torch.load(checkpoint, 'cpu', weights_only=True)  # written by torch before 1.6


def load_trained(checkpoint, use_ema=True, with_branches=True):
    """Make the network of a training checkpoint again, and load its weights.

    Args:
        checkpoint: A checkpoint that ``train.py`` (or timm's) has written. It is never unpickled beyond plain data.
        use_ema: Take the averaged weights where the checkpoint has them.
        with_branches: Load those of the branches of a run with --dks, too.

    Returns:
        The network, a DKSModel of a run with --dks; the arguments of the run by name; and what else the checkpoint
        holds, by name.

    Raises:
        ValueError: If the checkpoint is not one of a run.
    """
    subject, state = f'checkpoint {str(checkpoint)!r}', read_checkpoint(checkpoint)
    if not isinstance(state, dict) or not isinstance(state.get('args'), argparse.Namespace):
        raise InputError(f'{subject} does not say how its model was made; give one of a run, or for '
                         'dks-timm export --model NAME')
    args = {**vars(create_parser().parse_args([])), **check_types(subject, vars(state['args']))}
    check_model_name(args['model'], f'{subject}: model')
    net = create_model(argparse.Namespace(**{
        **args, 'pretrained': False, 'pretrained_path': None, 'initial_checkpoint': ''}))
    with naming(subject, RuntimeError):  # what torch raises for weights of another model
        # Without the statistics that split BatchNorm keeps for training only.
        load_checkpoint(prune(net), str(checkpoint), use_ema=use_ema, filter_fn=lambda state, _: plain_tensors(state))
        if with_branches and isinstance(net, DKSModel):
            task_state = use_ema and state.get('task_state_ema') or state.get('task_state') or {}
            load_branches(net, plain_tensors(task_state.get('branches', {})), subject)
    return net, args, state
