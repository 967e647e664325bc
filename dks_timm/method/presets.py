"""The paper's branches, as overrides of the template by supervised stage (Sun et al., CVPR 2019, section 4).

On ImageNet, after layer2: layer3 at about half depth and two blocks of layer4; after layer3: layer4 at twice the width.
On CIFAR, after the first stage: all of the second and half of the third (ResNet-110: half of both), rounded up; after
the second: the third at twice the width.
"""
from typing import Any, Dict

PRESETS: Dict[str, Dict[int, Dict[str, Any]]] = {
    'resnet18': {2: dict(layers=(2, 2, 1, 2)), 3: dict(channels=(64, 128, 256, 1024))},
    'resnet34': {2: dict(layers=(3, 4, 3, 2)), 3: dict(channels=(64, 128, 256, 1024))},
    'resnet50': {2: dict(layers=(3, 4, 3, 2)), 3: dict(channels=(64, 128, 256, 1024))},
    'resnet101': {2: dict(layers=(3, 4, 12, 2)), 3: dict(channels=(64, 128, 256, 1024))},
    'resnet152': {2: dict(layers=(3, 8, 18, 2)), 3: dict(channels=(64, 128, 256, 1024))},
    'resnet32_cifar': {1: dict(layers=(5, 5, 3)), 2: dict(channels=(16, 32, 128))},
    'resnet110_cifar': {1: dict(layers=(18, 9, 9)), 2: dict(channels=(16, 32, 128))},
    'wrn_28_10_cifar': {1: dict(layers=(4, 4, 2)), 2: dict(channels=(160, 320, 1280))},
    'densenet_40_12_cifar': {1: dict(layers=(12, 12, 6)), 2: dict(growth_rate=(12, 12, 36))},
}

# Networks that the paper does not have, by the rules of ResNet-32, WRN-28-10 and the ResNets on ImageNet.
PRESETS_BY_ANALOGY: Dict[str, Dict[int, Dict[str, Any]]] = {
    'resnet20_cifar': {1: dict(layers=(3, 3, 2)), 2: dict(channels=(16, 32, 128))},
    'resnet44_cifar': {1: dict(layers=(7, 7, 4)), 2: dict(channels=(16, 32, 128))},
    'resnet56_cifar': {1: dict(layers=(9, 9, 5)), 2: dict(channels=(16, 32, 128))},
    'wrn_16_2_cifar': {1: dict(layers=(2, 2, 1)), 2: dict(channels=(32, 64, 256))},
    'wrn_40_4_cifar': {1: dict(layers=(6, 6, 3)), 2: dict(channels=(64, 128, 512))},
    'resnet18_cifar': PRESETS['resnet18'],
    'resnet50_cifar': PRESETS['resnet50'],
}
