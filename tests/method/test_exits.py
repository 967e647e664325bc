"""Early exits: what is counted in evaluation, what an exit costs, and a forward that stops at one."""
import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dks_timm import create_dks_model, prune
from dks_timm.method.cost import exit_flops, inspect_model
from dks_timm.training.metrics import THRESHOLDS, HeadCounts

NAMES = ['backbone', 'stage1', 'stage2']


def batches(sizes=(5, 7), classes=4, scale=3.):
    return [([scale * torch.randn(size, classes) for _ in NAMES], torch.randint(classes, (size,))) for size in sizes]


@pytest.mark.parametrize('max_samples', [None, 9])
def test_counts_are_those_of_the_definition(max_samples):
    counts = HeadCounts(NAMES, torch.device('cpu'), max_samples)
    given = batches()
    for logits, target in given:
        counts.update(logits, target)
    agreement, rows = counts.compute()

    z = [torch.cat([logits[m] for logits, _ in given])[:max_samples] for m in range(3)]
    target = torch.cat([t for _, t in given])[:max_samples]
    same = (z[0].argmax(1) == z[2].argmax(1)).double().mean().item()
    assert list(agreement) == ['agree_backbone_stage1', 'agree_backbone_stage2', 'agree_stage1_stage2']
    assert agreement['agree_backbone_stage2'] == pytest.approx(100 * same)
    assert [(row['exit'], row['threshold']) for row in rows] == [(n, t) for n in NAMES[1:] for t in THRESHOLDS]
    for row in rows:
        own = z[NAMES.index(row['exit'])]
        leave = own.softmax(1).max(1).values >= row['threshold']
        answer = torch.where(leave, own.argmax(1), z[0].argmax(1))
        assert row['leave'] == pytest.approx(100 * leave.double().mean().item())
        assert row['top1'] == pytest.approx(100 * (answer == target).double().mean().item())
    shares = [row['leave'] for row in rows if row['exit'] == 'stage1']
    assert shares[0] == 100 and any(0 < share < 100 for share in shares)  # else this test would see nothing


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    return create_dks_model('test_resnet', num_classes=4).eval()


@pytest.mark.parametrize('branches', [None, [0], [1]])
def test_an_early_exit_gives_the_logits_of_the_first_head_that_is_sure(net, branches):
    x = torch.randn(6, 3, 64, 64)
    with torch.no_grad():
        heads = net.exits(x)
        confidence = [z.softmax(1).max(1).values for z in heads]
        asked = [0, 1] if branches is None else branches
        threshold = float(confidence[asked[0] + 1].sort().values[3])  # half leave at the first that is asked
        logits, exits = net.early_exit(x, threshold, branches)
    wanted = [next((i + 1 for i in asked if confidence[i + 1][n] >= threshold), 0) for n in range(6)]
    assert exits.tolist() == wanted and len(set(wanted)) > 1
    assert torch.equal(logits, torch.stack([heads[m][n] for n, m in enumerate(wanted)]))
    assert torch.equal(net(x), heads[0])  # nothing of it stays in the network


@pytest.mark.parametrize('fast_norm', [False, True])
@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_what_an_exit_costs_is_what_its_forward_computes(name, fast_norm, monkeypatch):
    monkeypatch.setattr(timm.layers.fast_norm, '_USE_FAST_NORM', fast_norm)
    net = create_dks_model(name, num_classes=4).eval().requires_grad_(False)
    size = (3, *net.layout['image_size'])
    counted = exit_flops(net, size)
    classifiers = inspect_model(name, num_classes=4)['classifiers']
    assert [counted['backbone'], *(b['branch'] for b in counted['branches'])] == [c['flops'] for c in classifiers]
    for i, cost in enumerate(counted['branches']):
        for threshold, wanted in ((0., cost['to_stage']), (1.1, counted['backbone'])):
            # Of attention, torch does not count what runs as one kernel on a CPU.
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                _, exits = net.early_exit(torch.randn(1, *size), threshold, branches=[i])
            assert exits.tolist() == [0 if threshold > 1 else i + 1]
            assert counter.get_total_flops() == wanted + cost['branch']
    assert counted['branches'][0]['to_stage'] < counted['branches'][1]['to_stage'] < counted['backbone']


def test_what_an_exit_costs_is_counted_at_any_image_size_and_after_pruning():
    wanted = exit_flops(create_dks_model('test_resnet', num_classes=4, image_size=(96, 96)), (3, 96, 96))
    other = create_dks_model('test_resnet', num_classes=4)  # its tails are planned for another size
    prune(other)
    assert exit_flops(other, (3, 96, 96)) == wanted


def test_an_early_exit_needs_evaluation_mode(net):
    with pytest.raises(ValueError, match='evaluation mode; call eval'):
        create_dks_model('test_resnet', num_classes=4).early_exit(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize('name, size, branches', [
    ('test_resnet', 64, 'auto'), ('test_vit', 160, 'auto'), ('test_convnext', 64, 'conv')])
def test_a_graph_of_all_exits_takes_a_batch_of_any_size(name, size, branches):
    class Exits(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return tuple(self.net.exits(x))

    exits = Exits(create_dks_model(name, num_classes=4, branches=branches)).eval()
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        exits(x)
        graph = torch.export.export(exits, (x,), dynamic_shapes=({0: torch.export.Dim('batch')},)).module()
        for count in (1, 5):
            x = torch.randn(count, 3, size, size)
            torch.testing.assert_close(graph(x), exits(x))
