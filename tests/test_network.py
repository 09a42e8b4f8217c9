"""The networks, their files and their use on volumes."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from bids_jointseg.card import ModelCard, ModelError, read_card
from bids_jointseg.inference import _starts, agreement, combine, predict
from bids_jointseg.labels import CLASSES
from bids_jointseg.network import (
    HighResNet,
    InstanceNorm,
    UNet,
    begin_with,
    build,
    load_model,
    save_model,
)

SMALL = {
    'unet': {'name': 'unet', 'channels': [4, 8, 8]},
    'highresnet': {'name': 'highresnet', 'channels': [2, 4, 4], 'blocks': 1},
}


@pytest.fixture(params=SMALL)
def network(request):
    torch.manual_seed(0)
    return build(SMALL[request.param]).eval()


def images(*shape: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(1, 1, *shape, generator=generator) for name in ('T1w', 'FLAIR')}


def test_any_subset_of_modalities_in_any_order(network):
    both = images(12, 16, 8)
    with torch.inference_mode():
        expected = network(both)
        assert expected.shape == (1, 8, 12, 16, 8)
        assert torch.equal(network(dict(reversed(both.items()))), expected)
        for name in both:
            alone = network({name: both[name]})
            assert alone.shape == expected.shape
            assert not torch.equal(alone, expected)
        with pytest.raises(ValueError, match='at least one modality'):
            network({})


def test_the_mean_of_a_modality_with_itself_is_that_modality(network):
    network.branches['FLAIR'].load_state_dict(network.branches['T1w'].state_dict())
    x = images(12, 16, 8)['T1w']
    with torch.inference_mode():
        assert torch.allclose(network({'T1w': x, 'FLAIR': x}), network({'T1w': x}), atol=1e-5)


def test_a_wider_u_net_begins_with_the_answers_of_a_narrower_one():
    torch.manual_seed(0)
    narrow, wide = (build({'name': 'unet', 'channels': c}).eval() for c in ([4, 8, 8], [6, 12, 8]))
    both = images(12, 16, 8)
    with torch.inference_mode():
        assert not torch.allclose(wide(both), narrow(both), atol=1e-2)
        begin_with(wide, narrow)
        assert torch.allclose(wide(both), narrow(both), atol=1e-4)
    # What is new is alive: it gets a gradient from the first or, behind a zero, the second step.
    wide.train()(both).square().mean().backward()
    assert wide.head.weight.grad[:, 4:].abs().min() > 0


@pytest.mark.parametrize('architecture', [*SMALL.values(), {'name': 'unet', 'channels': [4, 8]}])
def test_no_network_begins_with_another_one(architecture):
    wide = {'name': 'highresnet', 'channels': [4, 8, 8], 'blocks': 1}
    with pytest.raises(ModelError, match='nor a narrower U-Net'):
        begin_with(build(wide), build(architecture))


def test_the_papers_network_layer_by_layer():
    network = HighResNet()
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv3d)]
    # 2 x (1 + 3 x 2) in the branches, (3 + 3) x 2 in the trunk, one to the classes.
    assert len(convolutions) == 2 * 7 + 12 + 1
    assert [m.dilation[0] for m in convolutions[14:26]] == [2] * 6 + [4] * 6
    assert [m.out_channels for m in convolutions[14:]] == [32] * 6 + [64] * 6 + [8]
    assert sum(p.numel() for p in network.parameters()) == 846216


class Pointwise(torch.nn.Module):
    """Answers from each voxel alone: what windows cannot change."""

    def forward(self, images):
        mean = sum(images.values()) / len(images)
        return torch.cat([mean * k for k in range(8)], dim=1)


def test_windows_cover_a_volume_and_blend():
    arrays = {name: x[0, 0].numpy() for name, x in images(24, 20, 90).items()}
    (whole,) = predict(Pointwise(), arrays, device='cpu')
    (parts,) = predict(Pointwise(), arrays, device='cpu', window=(16, 20, 48))
    assert whole.shape == (8, 24, 20, 90)
    np.testing.assert_allclose(parts, whole, atol=2e-3)
    np.testing.assert_allclose(parts.sum(0), 1, atol=1e-4)


@pytest.mark.parametrize(
    ('size', 'width'), [(10, 10), (11, 10), (90, 48), (149, 64), (150, 64), (200, 64)]
)
def test_every_voxel_is_seen_with_its_surroundings(size, width):
    starts = _starts(size, width)
    seen = np.zeros(size)
    for start in starts:
        inside = np.minimum(np.arange(width) + 1, width - np.arange(width))
        inside[: width // 2] += size * (start == 0)
        inside[width // 2 :] += size * (start + width >= size)
        seen[start : start + width] = np.maximum(seen[start : start + width], inside[:size])
    assert seen.min() >= width // 4
    assert starts[0] == 0
    assert starts[-1] == max(0, size - width)
    assert len(starts) <= max(1, 2 * size / width)


def test_a_model_file_gives_the_network_back(network, tmp_path):
    architecture = SMALL['unet' if isinstance(network, UNet) else 'highresnet']
    card = ModelCard(name='tiny', version='1', architecture=architecture, licence='CC0-1.0')
    save_model(network, card, tmp_path)
    read = read_card(tmp_path / 'tiny.json')
    assert read.licence == 'CC0-1.0'
    assert re.fullmatch('[0-9a-f]{64}', read.sha256)
    loaded = load_model(read)
    both = images(12, 16, 8)
    with torch.inference_mode():
        assert torch.allclose(loaded(both), network(both), atol=2e-2)
    assert {file.name for file in tmp_path.iterdir()} == {'tiny.json', 'tiny.safetensors'}


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    card = ModelCard(name='tiny', version='1', architecture=SMALL['unet'])
    return save_model(build(SMALL['unet']), card, tmp_path)


def test_tampered_weights_are_refused(saved):
    content = bytearray(saved.weights.read_bytes())
    content[-1] ^= 1
    saved.weights.write_bytes(content)
    with pytest.raises(ModelError, match=r'tiny\.safetensors: .*SHA-256'):
        load_model(read_card(saved.path))


def test_missing_weights_are_named(saved):
    saved.weights.unlink()
    with pytest.raises(ModelError, match=r'tiny\.safetensors: cannot read'):
        load_model(read_card(saved.path))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'classes': ['BG', 'WM']}, 'classes are'),
        ({'modalities': ['T2w']}, 'modalities are'),
        ({'surprise': 1}, 'unknown entries'),
        ({'slice_mm': [3, 1]}, 'positive size'),
    ],
)
def test_cards_of_another_version_are_refused(saved, change, message):
    record = json.loads(saved.path.read_text()) | change
    saved.path.write_text(json.dumps(record))
    with pytest.raises(ModelError, match=rf'tiny\.json: .*{message}'):
        read_card(saved.path)


def test_weights_of_another_architecture_are_refused(saved):
    record = json.loads(saved.path.read_text())
    record['architecture']['channels'] = [4, 8, 16]
    saved.path.write_text(json.dumps(record))
    with pytest.raises(ModelError, match='do not fit the card'):
        load_model(read_card(saved.path))


def test_unknown_models_and_broken_cards(tmp_path):
    with pytest.raises(ModelError, match='not in the package'):
        read_card('no-such-model')
    broken = tmp_path / 'broken.json'
    broken.write_text('{')
    with pytest.raises(ModelError, match=r'broken\.json: the model card is not JSON'):
        read_card(broken)
    with pytest.raises(ModelError, match="architecture 'vgg'"):
        build({'name': 'vgg'})


def test_normalisation_is_per_image():
    torch.manual_seed(0)
    layer = InstanceNorm(3)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 6, 5, 4) * 3 + 1
    expected = torch.nn.functional.instance_norm(x, weight=layer.weight, bias=layer.bias)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    assert torch.allclose(layer(x[:1]), expected[:1], atol=1e-5)


def test_the_mirror_image_is_averaged_in():
    torch.manual_seed(0)
    network = build(SMALL['unet']).eval()
    arrays = {name: x[0, 0].numpy() for name, x in images(16, 16, 8).items()}
    members = predict(network, arrays, mirror=0, device='cpu')
    both = combine(members)
    flipped = {name: x[::-1] for name, x in arrays.items()}
    (alone,) = predict(network, arrays, device='cpu')
    np.testing.assert_array_equal(alone, members[0])
    assert np.abs(both - alone).max() > 1e-4
    other = combine(predict(network, flipped, mirror=0, device='cpu'))
    np.testing.assert_allclose(both, other[:, ::-1], atol=1e-5)


def test_a_bias_shifts_the_odds_of_the_class_it_names_for_the_scans_it_names(saved):
    card = replace(read_card(saved.path), bias={'FLAIR': {'L': 1.0}, 'T1w+FLAIR': {'L': 1.0}})
    assert card.bias_for(['FLAIR', 'T1w']) == tuple(float(name == 'L') for name in CLASSES)
    assert not any(card.bias_for(['T1w']))
    plain_network, biased = load_model(saved), load_model(card)
    rng = np.random.default_rng(0)
    images = {name: rng.normal(size=(8, 8, 8)).astype(np.float32) for name in ('T1w', 'FLAIR')}
    (plain,) = predict(plain_network, images, device='cpu')
    (shifted,) = predict(biased, images, device='cpu')
    odds = (p[CLASSES.index('L')] / (1 - p[CLASSES.index('L')]) for p in (shifted, plain))
    np.testing.assert_allclose(np.divide(*odds), np.e, rtol=1e-3)
    np.testing.assert_allclose(shifted.sum(axis=0), 1, rtol=1e-5)


def test_members_are_combined_calibrated_and_counted():
    first, second = np.zeros((2, len(CLASSES), 1, 1, 2), np.float32)
    first[[0, 2], 0, 0, 0] = 0.2, 0.8
    second[[0, 2], 0, 0, 0] = 0.6, 0.4
    first[1, 0, 0, 1] = second[1, 0, 0, 1] = 1
    assert combine([first, second])[2, 0, 0].tolist() == pytest.approx([0.6, 0])
    # T = 1/2 squares the odds: (0.6 / 0.4)^2 = 2.25 = 0.6923 / 0.3077.
    sharp = combine([first, second], temperature=0.5)
    assert sharp[2, 0, 0, 0] == pytest.approx(2.25 / 3.25)
    np.testing.assert_allclose(sharp.sum(axis=0), 1, rtol=1e-6)
    assert agreement([first, second], CLASSES[2]).tolist() == [[[0.5, 0]]]
    assert combine([first])[2, 0, 0, 0] == pytest.approx(0.8)
    assert first[2, 0, 0, 0] == np.float32(0.8), 'members are not changed in place'
