"""Weights of a plain model from elsewhere, such as torchvision's training script, as an exported folder."""
import argparse
import logging
from collections import Counter
from pathlib import Path
from typing import Optional, Union

import timm
import torch
from timm.models import load_state_dict

from ..errors import UNREADABLE, InputError, naming, one_line
from ..training.build import check_model_name, naming_model
from ..training.trained import read_checkpoint
from .export import check_export_dir, check_onnx, export

_logger = logging.getLogger(__name__)


def convert_checkpoint(
        checkpoint: Union[str, Path],
        out_dir: Union[str, Path],
        model_name: str,
        num_classes: Optional[int] = None,
        use_ema: bool = True,
        license: Optional[str] = None,
        onnx: bool = False,
        overwrite: bool = False,
) -> Path:
    """Export the weights of a plain timm model, or one of torchvision with the same entries, that no run here trained.

    The weights are those of the file, or of its entry 'state_dict' or 'model', with or without the 'module.' of a
    wrapper. Entries that the model does not have, such as auxiliary branches, are left out with a warning. The
    preprocessing is what timm knows of the model's name.

    Args:
        model_name: What ``timm.create_model`` makes the model by.
        num_classes: Number of classes; None takes that of the classifier's weights.
        use_ema: Take averaged weights where the file has them.

    Raises:
        ValueError: If the file is a checkpoint of a run, which knows its model, or its weights are not the model's.

    Example:
        >>> convert_checkpoint('resnet50_dks.pth.tar', 'out/resnet50', 'resnet50.tv_in1k')  # doctest: +SKIP
    """
    check_export_dir(out_dir, overwrite)
    check_onnx(onnx)
    check_model_name(model_name, '--model')
    subject = f'checkpoint {str(checkpoint)!r}'
    state = {} if str(checkpoint).endswith('.safetensors') else read_checkpoint(checkpoint)
    args = state.get('args') if isinstance(state, dict) else None
    # torchvision's script writes 'args' and 'model', others 'args' that do not name it so.
    if isinstance(args, argparse.Namespace) and hasattr(args, 'model') and 'state_dict' in state:
        raise InputError(
            f'--model {model_name}: {subject} is one of a run and knows its model, {args.model!r}; leave --model out')
    with naming(f'{subject} cannot be read', AttributeError, TypeError, *UNREADABLE):
        weights = load_state_dict(str(checkpoint), use_ema)
        weights = {name: tensor for name, tensor in weights.items() if isinstance(tensor, torch.Tensor)}
    with naming_model(f'--model {model_name}'):
        model = timm.create_model(model_name)
        classifier = model.pretrained_cfg['classifier']
        first = f'{classifier if isinstance(classifier, str) else classifier[0]}.weight'
        if num_classes is None and first in weights:
            num_classes = len(weights[first])
        if num_classes not in (None, model.num_classes):
            model = timm.create_model(model_name, num_classes=num_classes)
    own = model.state_dict().keys()
    left_out = Counter(name.partition('.')[0] for name in weights if name not in own)
    with naming(f'--model {model_name}: {subject} has other weights', RuntimeError):
        model.load_state_dict({name: tensor for name, tensor in weights.items() if name in own})
    deeper = [name for name in left_out if name in dict(model.named_children())]
    if deeper:  # ResNet-34 has all that ResNet-18 has
        raise InputError(f'--model {model_name}: {subject} is of a larger model, with more in {", ".join(deeper)}')
    if left_out:
        names, count = ', '.join(f'{name} ({n})' for name, n in left_out.items()), sum(left_out.values())
        _logger.warning(one_line(f'Left out: {count} entries that {model_name} does not have, of {names}'))
    card = dict(converted_from=Path(checkpoint).name, license=license)
    return export(out_dir, model, card=card, onnx=onnx, overwrite=overwrite)
