"""Settings of the method by name, arguments of DKSLoss: ``DKSLoss(**PRESETS['distill'])``, ``--dks-preset distill``."""

PRESETS = dict(
    paper=dict(),  # every classifier teaches every other, at temperature 1: the defaults
    distill=dict(direction='to-backbone', temperature=3.),  # branches learn the labels alone, and teach the backbone
)
