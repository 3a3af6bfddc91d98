"""The benchmark of the ConvLSTM compares networks that compute the same."""

import torch

from benchmarks.convlstm_training import SETTINGS, Setting, peer_of


def test_outputs_of_both_are_equal():
    model = Setting(4, 2, 3, 16, 2).model()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    videos = torch.rand(2, 3, 1, 16, 16)
    found = peer_of(model)(videos, 4).sigmoid()
    torch.testing.assert_close(found, model(videos, prediction_length=4).predictions)
    assert {one.kernel_size for one in SETTINGS} == {3}
