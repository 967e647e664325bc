"""The paper's CIFAR networks. Importing this package registers them with timm.

From then on ``timm.create_model('resnet32_cifar')`` makes them like timm's own models. timm alone does not know them:
what loads an exported one has to import this package first.
"""
from . import densenet_cifar as _densenet_cifar
from . import resnet_cifar as _resnet_cifar
from .densenet_cifar import *  # noqa: F403
from .resnet_cifar import *  # noqa: F403

ARCHITECTURES = frozenset({**_densenet_cifar.default_cfgs, **_resnet_cifar.default_cfgs})
