"""Several labels an image: targets of every form, losses, metrics, and what a run leaves behind."""
import json

import pytest
import timm
import torch
from helpers import datasets as sets
from helpers.train import main, rows, two_processes
from sklearn.metrics import average_precision_score, f1_score
from timm.loss import MULTI_LABEL_LOSS_TYPES, create_classification_loss

from dks_timm import errors
from dks_timm.cli import main as dks_timm_command
from dks_timm.training import build, config, data, metrics, readers

# Labels of image number i of three classes, as indices.
LABELS = [[0], [0, 2], [], [1, 2], [2], [0, 1, 2]]
SMALL = [
    '--task', 'multilabel', '--dataset', 'multidigits', '--num-classes', '10', '--model', 'test_resnet',
    '--img-size', '32', '--device', 'cpu', '-b', '50', '--workers', '0', '--epochs', '1', '--warmup-epochs', '0',
    '--opt', 'adamw', '--lr', '2e-3', '--data-on-device', '--no-aug']
# The run of the fixture.
TWO_EPOCHS = ['--dks', '--epochs', '2', '--model-ema', '--model-ema-decay', '0.5', '--seed', '1']


@pytest.fixture(scope='module', autouse=True)
def a_tenth_of_the_canvases():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers.MultiDigits, 'counts', (400, 100))
        yield


def hot(i):
    return [float(c in LABELS[i % 6]) for c in range(3)]


def parquet(root, field):
    """A Hugging Face dataset whose field of targets is of one of timm's forms."""
    datasets = pytest.importorskip('datasets', reason='hfds/ and hfids/ need the package datasets')
    names = datasets.ClassLabel(names=list('abc'))
    features = dict(
        labels=datasets.Sequence(names), kind=datasets.Value('string'),
        multihot=datasets.Sequence(datasets.Value('float32')),
        nested=dict(a=datasets.Value('int64'), b=datasets.Value('bool'), c=datasets.Value('int64')))
    for split, count in sets.COUNTS.items():
        samples = [dict(
            image=dict(bytes=sets.encoded(i), path=f'{i}.png'), labels=LABELS[i % 6], kind='yes', multihot=hot(i),
            nested=dict(zip('abc', hot(i), strict=True))) for i in range(count)]
        (root / 'data').mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(samples, features=datasets.Features(image=datasets.Image(), **features)).to_parquet(
            root / f'data/{split}-00000-of-00001.parquet')
    return ['--data-dir', f'{root}-cache', *FIELDS[field]]


FIELDS = dict(
    indices=['--target-key', 'labels'], multihot=['--target-key', 'multihot', '--target-format', 'multihot'],
    fields=['--target-key', 'nested/a,nested/b,nested/c'])


def shards(root, field):
    pytest.importorskip('webdataset', reason='wds/ needs the package webdataset')
    for split, count in sets.COUNTS.items():
        files = []
        for i in range(count):
            meta = dict(labels=LABELS[i % 6], multihot=hot(i), nested=dict(zip('abc', hot(i), strict=True)))
            files += [(f'{i:04d}.png', sets.encoded(i)), (f'{i:04d}.json', json.dumps(meta).encode())]
        sets.make_tar(root / f'{split}.tar', files)
    return ['--dataset', 'wds/x', '--data-dir', str(root), '--train-split', 'train.tar|12', '--val-split',
            'validation.tar|6', *FIELDS[field]]


@pytest.mark.parametrize('field', FIELDS)
@pytest.mark.parametrize('kind', ['hfds', 'hfids', 'wds'])
def test_every_form_of_targets_becomes_one_vector_an_image(tmp_path, kind, field):
    more = shards(tmp_path / 'x', field) if kind == 'wds' else parquet(tmp_path / 'x', field)
    if kind != 'wds':
        more += ['--dataset', f'{kind}/{tmp_path / "x"}']
    if kind == 'hfids':
        more += ['--train-num-samples', '12', '--val-num-samples', '6']
    args = sets.parse('--task', 'multilabel', *more)
    train, val = sets.create_loaders(args)[:2]
    found = [(int(v), y.tolist()) for x, target in val for v, y in zip(x[:, 0, 0, 0].round(), target, strict=True)]
    assert found == [(i, hot(i)) for i in range(6)]
    for x, target in train:
        assert target.dtype == torch.float32 and target.shape == (len(x), 3)
    names = data.label_names(readers.create(args, 'val', is_training=False))
    of_classes = None if kind == 'wds' else list('abc')
    assert names == dict(indices=of_classes, multihot=None, fields=['nested/a', 'nested/b', 'nested/c'])[field]


@pytest.mark.parametrize('more, said', [
    (['--target-key', 'labels', '--num-classes', '2'], r'--num-classes 2'),
    (['--target-key', 'multihot'],
     r'--target-format indices with --num-classes 3: the data holds \[1.0, 0.0, 0.0\]; .* --target-format multihot'),
    (['--target-key', 'labels', '--target-format', 'multihot'],
     r'--target-format multihot .*the data holds \[0\]; wanted'),
    (['--target-key', 'kind,nested/a,nested/b'], r'--target-key kind,nested/a,nested/b: .*another type'),
    (['--target-key', 'nested/a,nested/x'], r"--dataset hfds.*nested/x"),
    (['--target-key', 'nested'], r'--target-format indices .*the data holds'),
])
def test_targets_of_another_form_are_named_with_the_flags(tmp_path, more, said):
    common = [*parquet(tmp_path / 'x', 'indices')[:2], '--dataset', f'hfds/{tmp_path / "x"}', '--task', 'multilabel']
    with pytest.raises(errors.OptionError, match=said):
        for loader in sets.create_loaders(sets.parse(*common, *more))[:2]:
            list(loader)


def test_labels_of_several_need_the_task(tmp_path):
    common = [*parquet(tmp_path / 'x', 'indices'), '--dataset', f'hfds/{tmp_path / "x"}']
    with pytest.raises(errors.DataError, match=r'--task classification: the data holds the labels \[0\] .* multilabel'):
        list(sets.create_loaders(sets.parse(*common))[1])


def test_the_built_in_set_is_the_same_every_time_and_shares_no_digit_between_splits():
    train, again, val = (readers.MultiDigits(split) for split in ('train', 'train', 'validation'))
    assert (len(train), len(val)) == (400, 100)
    assert [(a.tobytes(), la) for a, la in train] == [(b.tobytes(), lb) for b, lb in again]
    of_train, of_val = ({image.tobytes() for image, _ in readers.Digits(split)} for split in ('train', 'validation'))
    assert not of_train & of_val
    assert {len(labels) for _, labels in train} == {2, 3}
    assert all(len(set(labels)) == len(labels) and image.size == (32, 32) for image, labels in val)
    assert {label for _, labels in val for label in labels} == set(range(10))


def test_ensemble_is_the_mean_of_the_probabilities():
    logits = [torch.randn(5, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    mean = sum(z.sigmoid() for z in logits) / 3
    torch.testing.assert_close(metrics.ensemble(logits, multi_label=True).sigmoid(), mean)
    extreme = metrics.ensemble([torch.tensor([[1e4, -1e4]]), torch.tensor([[1e4, -1e4]])], multi_label=True)
    assert torch.equal(extreme, torch.tensor([[1e4, -1e4]]))


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run with branches, its average, and the exported network with the branches beside it."""
    root = tmp_path_factory.mktemp('run')
    export = ['--export-dir', root / 'model', '--keep-branches']
    main(*SMALL, *TWO_EPOCHS, *export, '--output', root, '--experiment', 'x')
    return root


def test_a_run_records_the_metrics_of_timm_and_of_every_head(run):
    last = rows(run / 'x')[-1]
    assert list(last)[:8] == [
        'epoch', 'train_loss', 'eval_loss', 'eval_map', 'eval_micro_f1', 'eval_macro_f1', 'eval_sample_f1', 'lr']
    assert {f'eval_map_{head}' for head in ('stage2', 'stage3', 'ensemble')} < set(last)
    assert not [name for name in last if 'top1' in name or 'agree' in name]


def test_the_recorded_metrics_are_those_of_the_exported_heads(run):
    import dks_timm
    args = sets.parse(*SMALL, '--num-classes', '10', '-b', '50')
    config = {**timm.data.resolve_data_config(model=timm.create_model('test_resnet')), 'input_size': (3, 32, 32)}
    loader = sets.create_loaders(args, config)[1]
    net = dks_timm.create_dks_model(f'local-dir:{run / "model"}', pretrained=True).eval()
    with torch.inference_mode():
        heads = [torch.cat(z) for z in zip(*(net.exits(x) for x, _ in loader), strict=True)]
    target = torch.cat([y for _, y in loader]).numpy()
    last = rows(run / 'x')[-1]
    probabilities = [z.sigmoid().double().numpy() for z in heads]
    for name, p in zip(('', '_stage2', '_stage3', '_ensemble'), [*probabilities, sum(probabilities) / 3], strict=True):
        assert float(last[f'eval_map{name}']) == pytest.approx(100 * average_precision_score(target, p), abs=1e-3)
    for average in ('micro', 'macro'):
        f1 = 100 * f1_score(target, probabilities[0] >= 0.5, average=average, zero_division=0)
        assert float(last[f'eval_{average}_f1']) == pytest.approx(f1, abs=1e-3)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(heads[0], torch.tensor(target))
    assert float(last['eval_loss']) == pytest.approx(loss.item(), abs=1e-5)


def test_the_card_has_map_and_f1_and_says_how_to_read_the_outputs(run):
    from huggingface_hub import ModelCard
    card = ModelCard.load(run / 'model/README.md')
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    last = max(rows(run / 'x'), key=lambda row: float(row['eval_map']))
    assert found['Mean average precision of the backbone (%)'] == pytest.approx(float(last['eval_map']))
    assert {f'{average} F1 of the backbone (%)' for average in ('Micro', 'Macro', 'Sample')} < set(found)
    assert '.sigmoid()' in card.text and 'softmax' not in card.text and 'early_exit' not in card.text
    assert "function_to_apply='sigmoid'" in card.text and 'an image may have several' in card.text


def test_the_report_shows_map_and_leaves_early_exits_out(run):
    assert dks_timm_command(['report', str(run / 'x')]) == 0
    page = (run / 'x/report/index.html').read_text()
    assert 'mAP in the best epoch, %' in page and 'ensemble' in page
    assert 'Early exits' not in page and 'How often heads agree' not in page


@pytest.mark.parametrize('model, more', [
    ('x/model_best.pth.tar', []),
    ('model', ['--dataset', 'multidigits', '--task', 'multilabel'])])
def test_validate_finds_what_the_run_did_and_a_threshold_for_every_head(run, capsys, model, more):
    assert dks_timm_command(['validate', str(run / model), '--workers', '0', '--json', *more]) == 0
    found = json.loads(capsys.readouterr().out)
    best = max(rows(run / 'x'), key=lambda row: float(row['eval_map']))
    backbone = found['heads']['backbone']
    assert list(backbone) == ['loss', 'map', 'micro_f1', 'macro_f1', 'sample_f1', 'cost']
    for name in ('map', 'micro_f1', 'macro_f1', 'sample_f1', 'loss'):
        assert backbone[name] == pytest.approx(float(best[f'eval_{name}']), rel=1e-3), name
    for head in ('stage2', 'stage3', 'ensemble'):
        assert found['heads'][head]['map'] == pytest.approx(float(best[f'eval_map_{head}']), rel=1e-3)
    assert list(found['thresholds']) == list(found['heads'])
    for chosen in found['thresholds'].values():
        assert chosen['threshold'] < 0.5 and chosen['micro_f1'] > chosen['micro_f1_at_half']  # after a short training
    assert dks_timm_command(['validate', str(run / model), '--workers', '0', *more]) == 0
    assert 'that with the best micro F1' in capsys.readouterr().out


def test_runs_of_both_tasks_have_no_report_in_common(run, tmp_path, capsys):
    main(*SMALL, '--task', 'classification', '--dataset', 'digits', '--output', tmp_path, '--experiment', 'single')
    capsys.readouterr()
    assert dks_timm_command(['report', str(run / 'x'), str(tmp_path / 'single'), '--output', str(tmp_path / 'r')]) == 2
    assert 'no metric in common' in capsys.readouterr().err


def test_a_resumed_run_goes_on_bit_for_bit(run, tmp_path):
    argv = [*SMALL, *TWO_EPOCHS, '--output', tmp_path, '--experiment', 'x']
    main(*argv, '--stop-epoch', '1')
    assert len(rows(tmp_path / 'x')) == 1
    main(*argv, '--resume', 'auto')
    assert rows(tmp_path / 'x') == rows(run / 'x')


# Flags, and the arguments of timm's create_classification_loss that they stand for, for 3 and 5 of 10 images.
LOSS_FLAGS = dict(
    bce=(['--loss-pos-weight', 'neg_pos', '--loss-weight-power', '0.5', '--bce-sum', '--loss-class-weight', '2', '3'],
         dict(pos_weight=[(7 / 3) ** 0.5, 1.], bce_sum=True, class_weight=[2., 3.])),
    asl=(['--loss-class-weight', 'inv_freq', '--asl-gamma-neg', '2', '--asl-reduction', 'mean'],
         dict(class_weight=[1.25, 0.75], asl_gamma_neg=2., asl_reduction='mean')),
    poly=(['--poly-gamma', '1', '--smoothing', '0.2'], dict(poly_gamma=1., smoothing=0.2)),
    twoway=(['--twoway-tp', '2'], dict(twoway_tp=2.)), zlpr=([], {}),
    db=(['--db-focal-gamma', '1', '--cutmix', '1.0', '--smoothing', '0.1'],
        dict(class_counts=[3., 5.], num_samples=10, db_focal_gamma=1., soft_targets=True, smoothing=0.1)))


@pytest.mark.parametrize('loss', MULTI_LABEL_LOSS_TYPES)
def test_every_loss_of_timm_is_made_of_its_flags(loss):
    args, *_ = config.parse_args([*SMALL, '--loss', loss, *LOSS_FLAGS[loss][0]])
    stats = torch.tensor([3., 5.]), 10
    criterion = build.create_criterion(args, 2, stats)
    expected = create_classification_loss(loss, multi_label=True, **LOSS_FLAGS[loss][1])
    logits = torch.tensor([[2., -1.], [0.5, 3.]])
    target = torch.tensor([[1., 0.], [0., 1.]])
    torch.testing.assert_close(criterion(logits, target), expected(logits, target))


@pytest.mark.parametrize('mixed', [[], ['--mixup', '0.2']])
def test_a_run_with_a_loss_of_label_sets_learns(tmp_path, mixed):
    loss = ['--loss', 'db' if mixed else 'zlpr']
    main(*SMALL, '--dks', *loss, *mixed, '--epochs', '4', '--output', tmp_path, '--experiment', 'x')
    first, *_, last = rows(tmp_path / 'x')
    assert float(last['train_loss']) < 0.95 * float(first['train_loss'])


def test_counts_of_the_classes_are_those_of_the_training_data(tmp_path):
    more = [*parquet(tmp_path / 'x', 'indices'), '--dataset', f'hfds/{tmp_path / "x"}', '--task', 'multilabel']
    args = sets.parse(*more, '--loss', 'db')
    dataset, _ = data.create_datasets(args)
    data.encode_targets(args, dataset, 3)
    counts, count = data.class_stats(args, dataset, 3)
    assert (counts.tolist(), count) == ([6., 4., 8.], 12)
    (tmp_path / 'stats.json').write_text(json.dumps(dict(pos_counts=[1, 2, 3], num_samples=9)))
    args = sets.parse(*more, '--loss', 'db', '--class-stats', tmp_path / 'stats.json')
    counts, count = data.class_stats(args, dataset, 3)
    assert (counts.tolist(), count) == ([1., 2., 3.], 9)
    assert data.class_stats(sets.parse(*more), dataset, 3) is None


@pytest.mark.parametrize('name', ['folder', 'tars', 'hfds'])
def test_counts_of_single_labels_are_had_without_the_images(tmp_path, name):
    args = sets.parse(*sets.make(name, tmp_path / 'x'), '--loss', 'bce', '--loss-class-weight', 'inv_freq')
    dataset, _ = data.create_datasets(args)
    data.encode_targets(args, dataset, 3)
    counts, count = data.class_stats(args, dataset, 3)
    assert (counts.tolist(), count) == ([4, 4, 4], 12)


def test_a_stream_cannot_count_its_classes(tmp_path):
    args = sets.parse(*sets.make('wds', tmp_path / 'x'), '--loss', 'bce', '--loss-class-weight', 'inv_freq')
    with pytest.raises(errors.OptionError, match='--loss-class-weight: needs counts .* --class-stats FILE'):
        data.class_stats(args, data.create_datasets(args)[0], 3)


@pytest.mark.slow
def test_two_processes_have_the_metrics_of_one(tmp_path):
    # Without BatchNorm and hardly with a learning rate, so that the weights are the same.
    argv = [
        *parquet(tmp_path / 'x', 'indices'), '--dataset', f'hfds/{tmp_path / "x"}', '--task', 'multilabel', '--dks',
        '--num-classes', '3', '--model', 'test_vit', '--img-size', '160', '--device', 'cpu', '--workers', '0',
        '-b', '2', '--epochs', '1', '--warmup-epochs', '0', '--lr', '1e-30', '--output', tmp_path]
    main(*argv, '--experiment', 'one')
    two_processes(*argv, '--experiment', 'two')
    one, two = rows(tmp_path / 'one')[-1], rows(tmp_path / 'two')[-1]
    names = [name for name in one if name.startswith('eval_')]
    assert len(names) == 10
    for name in names:
        assert float(two[name]) == pytest.approx(float(one[name]), rel=1e-5), name
