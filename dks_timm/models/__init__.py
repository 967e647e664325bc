"""The paper's CIFAR networks; importing this registers them with timm.

timm makes them like its own models, ``timm.create_model('resnet32_cifar')``, once this package was imported.
"""
from .resnet_cifar import *  # noqa: F403
