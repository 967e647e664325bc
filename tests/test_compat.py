"""The private parts of other libraries in dks_timm/_compat.py are still there, and do their work."""
import timm
import torch
from timm.utils import ModelEmaV3
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from dks_timm import _compat


def test_a_loader_takes_another_batch_sampler_and_tells_whether_it_has_started_its_workers():
    loader = DataLoader(list(range(4)), batch_size=2, num_workers=1, persistent_workers=True)
    _compat.replace_batch_sampler(loader, BatchSampler(SequentialSampler(range(4)), 4, drop_last=False))
    assert not _compat.has_started(loader)
    assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3]]
    assert _compat.has_started(loader)


def test_an_average_in_bfloat16_has_a_generator_that_its_rounding_draws_from():
    model = torch.nn.Linear(8, 8).bfloat16()
    average = ModelEmaV3(model, decay=0.5)
    torch.nn.init.normal_(model.weight)
    generator = _compat.rounding_generator(average)
    before = generator.get_state()
    average.update(model)
    assert not torch.equal(before, generator.get_state())
    assert _compat.rounding_generator(None) is None


def test_timm_notes_the_arguments_of_a_model():
    assert _compat.creation_args(timm.create_model('test_resnet', layers=(1, 1, 1, 2)))['layers'] == (1, 1, 1, 2)
