"""Evaluation of a trained model as by timm's validate.py, with all heads of one that has branches."""
import logging
from pathlib import Path
from typing import Any, Dict, Mapping, Sequence

import timm
import torch
from timm.models import resolve_model_input_args
from timm.task import ClassificationTask, MultiLabelClassificationTask

from ..errors import OptionError, closest, flag, given_flags, naming
from ..method.cost import exit_flops, mean_exit_cost
from ..method.create import create_dks_model, read_layout
from ..method.model import DKSModel, format_table
from . import data, readers
from .build import check_model_name, naming_model, place_model
from .config import Config, check, check_harmless, create_parser, other_defaults
from .console import Progress
from .distributed import create_accelerator
from .metrics import HeadMetrics
from .trained import load_trained

_logger = logging.getLogger(__name__)

# What the run of a checkpoint decides, besides its network, where no flag does. Device, precision and batch are ours.
OF_RUN = (
    'data_dir', 'dataset', 'dataset_download', 'val_split', 'val_num_samples', 'class_map', 'input_img_mode',
    'input_key', 'target_key', 'target_format', 'task', 'multilabel_threshold', 'img_size', 'in_chans', 'input_size',
    'crop_pct', 'mean', 'std', 'interpolation',
    'naflex_loader', 'naflex_max_seq_len', 'naflex_patchify_channels_first')
# Sigmoid probabilities among which multi-label targets find their threshold.
LABEL_THRESHOLDS = tuple(i / 20 for i in range(1, 20))
_TITLES = dict(
    top1='top-1 %', top5='top-5 %', map='mAP %', micro_f1='micro F1 %', macro_f1='macro F1 %',
    sample_f1='sample F1 %', micro_f1_at_half='micro F1 % at 0.5', leave='leave %', backbone_top1="backbone's top-1 %")
# Above the table of thresholds: title of its first column, what they are, how they were chosen.
_EXITS = (
    'asked', 'Early exits: images leave at a branch from a confidence on, the backbone answers for the rest.',
    "the cheapest at which top-1 is not below the backbone's")
_LABELS = (
    'head', 'Labels: an image gets those that are at least as probable as a threshold.', 'that with the best micro F1')


def validate(model: str, given: Mapping[str, Any], use_ema: bool = True) -> Dict[str, Any]:
    """Evaluate a trained model.

    Args:
        model: Exported folder, ``hf-hub:owner/name``, name of a timm model, or checkpoint of a run.
        given: Flags of ``dks-timm validate`` by name, those that were given.
        use_ema: Take the averaged weights where a checkpoint has them.

    Returns:
        'model', 'ema' (whether the weights are an average), 'dataset', 'split', 'images', 'num_classes', 'input_size',
        'crop_pct', 'interpolation'; 'heads': by name, 'backbone' first, what timm's evaluator of the task found, and
        'cost', FLOPs over the backbone's; 'thresholds', from :func:`choose_exits`, {} without branches; where an image
        may have several labels, from :func:`choose_label_threshold` by head.

    Raises:
        OptionError: for bad input.
    """
    if not Path(model).is_file():  # a checkpoint may know its data
        readers.check_dataset(_settings(given, {}))
    net, of_run, ema = _load(model, given, use_ema)
    args = _settings(given, of_run)
    readers.check_dataset(args)
    accelerator = create_accelerator(args, set(given))
    # As timm's validate.py, at the size that a model is published for; a run evaluates at the one it trains at.
    with naming(given_flags(args, 'in_chans', 'input_size', 'mean', 'std'), AssertionError):  # of other channels
        data_config = data.resolve_preprocessing(args, net, use_test_size=not of_run)
    args = Config(**{**vars(args), 'in_chans': data_config['input_size'][0], 'num_classes': net.num_classes})
    dataset = readers.create(args, 'val', is_training=False)
    _check_classes(model, net.num_classes, given, dataset)
    has_branches = isinstance(net, DKSModel)
    net = place_model(args, net, data_config['input_size'], accelerator, f'MODEL {model}').eval()
    flops = exit_flops(net, data_config['input_size']) if has_branches else None
    crop_mode = {} if of_run else dict(crop_mode=data_config['crop_mode'])  # of which training knows nothing
    loader = data.create_eval_loader(args, dataset, data_config, net, accelerator, **crop_mode)
    names = ['backbone', *(f'stage{stage}' for stage in net.stages)] if has_branches else ['backbone']
    multi_label = args.task == 'multilabel'  # labels an image; the task brings timm's evaluator
    create_task, more = ClassificationTask, {}
    if multi_label:
        create_task, more = MultiLabelClassificationTask, dict(threshold=args.multilabel_threshold)
    task = create_task(net, device=accelerator.device, verbose=False, **more)
    metrics, halves = evaluate(args, net, task, names, loader, accelerator)
    if multi_label:
        thresholds = {
            name: choose_label_threshold(torch.cat(evaluator.outputs), torch.cat(evaluator.targets))
            for name, evaluator in zip(metrics.names, metrics.evaluators, strict=True)}
    else:
        thresholds = choose_exits(halves, flops) if halves else {}
    found = [evaluator.compute() for evaluator in metrics.evaluators]
    return dict(
        model=model,
        ema=ema,
        dataset=args.dataset or args.data_dir,
        split=args.val_split,
        images=metrics.evaluators[0].num_samples,
        num_classes=net.num_classes,
        **{key: data_config[key] for key in ('input_size', 'crop_pct', 'interpolation')},
        heads={
            name: dict(result, cost=cost)
            for name, result, cost in zip(metrics.names, found, _costs(flops), strict=True)},
        thresholds=thresholds,
    )


def _load(model, given, use_ema):
    """Return the network, the arguments of its run ({} where it is none of a checkpoint), and if it is an average."""
    path = Path(model.removeprefix('local-dir:'))
    if path.is_file():
        for name in {'in_chans', 'model_kwargs'} & given.keys():
            raise OptionError(f'{flag(name)} {given[name]}: MODEL {model} is a checkpoint, whose run says how its '
                              'model is made; leave it out')
        net, of_run, state = load_trained(path, use_ema)
        return net, of_run, use_ema and 'state_dict_ema' in state
    if path.is_dir():
        if not (path / 'config.json').is_file():
            raise OptionError(f'MODEL {model}: has no config.json; give an exported folder, or a checkpoint file as '
                              'model_best.pth.tar of a run')
        model = f'local-dir:{path}'
    elif ':' not in model and not timm.is_model(model.partition('.')[0]):
        raise OptionError(f'MODEL {model}: no such folder or checkpoint, and timm has no such model'
                          f'{closest(model, timm.list_models())}; a name on the Hub begins with hf-hub:')
    check_model_name(model)
    further = given.get('model_kwargs')
    channels = given.get('in_chans') or given.get('input_size', [None])[0]
    kwargs = {**(dict(in_chans=channels) if channels else {}), **(further or {})}
    size = {key: given[key] for key in ('img_size', 'input_size') if key in given}
    with naming_model(f'MODEL {model}' + (f' with --model-kwargs {further}' if further else ''), further):
        if read_layout(model):
            return create_dks_model(model, pretrained=True, **kwargs), {}, False
        return timm.create_model(**resolve_model_input_args(model, size, pretrained=True, **kwargs)), {}, False


def _settings(given, of_run):
    """Return a configuration of train.py: flags over the run of the checkpoint over defaults."""
    # Without a split to evaluate on, the run's images are those that it trained on.
    of_run = {key: of_run[key] for key in OF_RUN if key not in given and of_run.get(key) not in (None, '')}
    check_harmless('MODEL', of_run)
    # Nothing is trained, so that a dataset need not have a split to train on.
    settings = {**vars(create_parser().parse_args([])), 'train_split': '', 'batch_size': 256, **of_run, **given}
    settings.update(other_defaults(settings))
    if 'img_size' in given and of_run.get('input_size'):  # which would win
        settings['input_size'] = [of_run['input_size'][0], *[given['img_size']] * 2]
    if 'input_size' in given and 'in_chans' not in given:
        settings['in_chans'] = None
    check(Config(**settings), {**of_run, **given})
    return Config(**settings, prefetcher=True)


def _check_classes(model, num_classes, given, dataset):
    if given.get('num_classes', num_classes) != num_classes:
        raise OptionError(
            f'--num-classes {given["num_classes"]}: MODEL {model} has {num_classes} classes; leave it out')
    classes = data.class_to_idx(dataset)
    if num_classes <= max(classes.values(), default=-1):
        raise OptionError(f'MODEL {model}: has {num_classes} classes, the data {max(classes.values()) + 1}; wanted: '
                          'data of its classes, or a --class-map to them')
    if 0 < len(classes) < num_classes:
        _logger.warning(f'MODEL {model} has {num_classes} classes, the data {len(classes)}.')


@torch.inference_mode()
def evaluate(args, net, task, names, loader, accelerator):
    """Return the HeadMetrics of all images and, where heads are early exits, those of even and of odd ones."""
    metrics, *halves = (HeadMetrics(task, names, accelerator.device) for _ in range(3))
    halves = [] if metrics.counts is None else halves
    seen = 0
    with Progress(accelerator, 'Validation', len(loader)) as progress:
        for images, target in loader:
            if args.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with accelerator.autocast():
                logits = net.exits(images) if len(names) > 1 else net(images)
            metrics.update(logits, target)
            for i, half in enumerate(halves):
                mine = slice((i - seen) % 2, None, 2)
                half.update([z[mine] for z in logits], target[mine])
            seen += len(target)
            progress.step()
    return metrics, halves


def _costs(flops):
    """Return the cost of every head, and of the ensemble, over the backbone's."""
    if flops is None:
        return [1.]
    whole, branches = flops['backbone'], flops['branches']
    exits = [(branch['to_stage'] + branch['branch']) / whole for branch in branches]
    return [1., *exits, 1 + sum(branch['branch'] for branch in branches) / whole]


def choose_exits(halves: Sequence[HeadMetrics], flops: Mapping[str, Any]) -> Dict[str, Dict[str, Any]]:
    """Choose a threshold for an early exit at each branch on one half of the images, and measure it on the other.

    It is the cheapest at which answers are, on the first half, not less accurate than the backbone's, and cheaper.

    Args:
        halves: Metrics of the two halves.
        flops: From :func:`dks_timm.method.cost.exit_flops`.

    Returns:
        By branch, 'threshold' (None where none is accurate and cheap enough: the backbone answers for all), and on the
        second half: 'leave' (% of images), 'top1', 'backbone_top1', and 'cost', FLOPs over the backbone's, a mean over
        images.
    """
    (whole, rows), (other_whole, other_rows) = (half.compute() for half in halves)
    found = {}
    for branch, name in enumerate(halves[0].names[1:-1]):
        good = [
            (row['leave'], row['threshold'], other) for row, other in zip(rows, other_rows, strict=True)
            if row['exit'] == name and row['top1'] >= whole['top1']
            and mean_exit_cost(flops, branch, row['leave'] / 100) < 1]
        threshold, leave, top1, cost = None, 0., other_whole['top1'], 1.
        if good:  # the more images leave, the cheaper; where as many leave, the surest
            _, threshold, other = max(good, key=lambda entry: entry[:2])
            leave, top1, cost = other['leave'], other['top1'], mean_exit_cost(flops, branch, other['leave'] / 100)
        found[name] = dict(
            threshold=threshold, leave=leave, top1=top1, backbone_top1=other_whole['top1'], cost=cost)
    return found


def choose_label_threshold(logits: torch.Tensor, target: torch.Tensor) -> Dict[str, float]:
    """Choose the probability from which on a label is given on even images, and measure it on the odd ones.

    Args:
        logits: (N, num_classes).
        target: (N, num_classes), True for the labels of an image.

    Returns:
        'threshold', of :data:`LABEL_THRESHOLDS` the one with the best micro-F1, and on the odd images 'micro_f1' at it
        and 'micro_f1_at_half', at 0.5 (%).
    """
    probabilities = logits.sigmoid()

    def micro_f1(first, threshold):
        answer, truth = probabilities[first::2] >= threshold, target[first::2]
        return 200 * (answer & truth).sum().item() / max(1, answer.sum().item() + truth.sum().item())

    threshold = max(LABEL_THRESHOLDS, key=lambda value: (micro_f1(0, value), -abs(value - 0.5)))
    return dict(threshold=threshold, micro_f1=micro_f1(1, threshold), micro_f1_at_half=micro_f1(1, 0.5))


def format_validation(found: Mapping[str, Any]) -> str:
    """Format a result of :func:`validate` as `dks-timm validate` prints it."""
    size = 'x'.join(map(str, found['input_size']))
    text = (
        f'{found["model"]}{", average of the weights" * found["ema"]}: {found["images"]:,} images of '
        f'{found["dataset"]}{", split " * bool(found["split"])}{found["split"]}\n'
        f'input {size}, crop {found["crop_pct"]:g}, {found["interpolation"]}\n\n' + _table('head', found['heads']))
    if not found['thresholds']:
        return text
    title, what, how = _EXITS if 'leave' in next(iter(found['thresholds'].values())) else _LABELS
    chosen_on, others = (found['images'] + 1) // 2, found['images'] // 2
    return (
        f'{text}\n\n{what}\nEach threshold was chosen on every other image ({chosen_on:,}), as {how}.\n'
        f'The columns after it are measured on the other images ({others:,}).\n\n{_table(title, found["thresholds"])}')


def _table(title, rows):
    columns = list(next(iter(rows.values())))
    return format_table([title, *(_TITLES.get(column, column) for column in columns)], [
        [name, *(_cell(column, row[column]) for column in columns)] for name, row in rows.items()])


def _cell(column, value):
    if column == 'threshold':
        return 'none' if value is None else f'{value:g}'
    return f'{value:.{4 if column == "loss" else 2}f}'
