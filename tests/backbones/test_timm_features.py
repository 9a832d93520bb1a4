"""The timm backbone: bit-equal to timm's own features, cut off behind, and clear about weights it cannot have."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastbgad.backbones import Backbone, create_backbone
from fastbgad.backbones import weights as weights_module
from fastbgad.errors import BackboneError, CheckpointError, FeatureError

SMALL = "mobilenetv3_small_100"


def small(weights: object = "random", **options: object) -> Backbone:
    return create_backbone(SMALL, weights=weights, **options, standardize="none")  # type: ignore[arg-type]


def random_images(size: tuple[int, int], batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(size[0] * size[1])
    return torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8, generator=generator)


def timm_features(name: str, seed: int, images: Tensor) -> tuple[nn.Module, list[Tensor]]:
    """timm's own extractor of all levels with the same weights, fed as its documentation says."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        whole = timm.create_model(name, features_only=True)
    info = whole.feature_info.info
    if len(whole.feature_info.channels()) < len(info):  # transformers return only their last blocks unless told
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            whole = timm.create_model(name, features_only=True, out_indices=tuple(range(len(info))))
    # Frozen alike: PyTorch's kernels for linear layers round differently when a weight asks for a gradient.
    whole = whole.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    mean, std = (torch.tensor(whole.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    normalized = (images.float() / 255 - mean) / std
    with torch.inference_mode():
        features = whole(normalized.contiguous(memory_format=torch.channels_last))
    if str(getattr(whole, "output_fmt", "")).endswith("NHWC"):
        features = [feature.permute(0, 3, 1, 2) for feature in features]
    return whole, features


@pytest.mark.parametrize(
    ("name", "levels", "size", "truncated"),
    [
        ("tf_efficientnet_b6", (1, 2, 3), (64, 64), True),
        ("mobilenetv3_small_100", (1, 2, 3), (64, 64), True),
        ("mobilenetv3_small_100", (0, 2), (70, 53), True),
        ("mobilenetv3_small_100", (4,), (64, 64), True),
        ("resnet18", (1, 2, 3), (61, 67), True),
        ("wide_resnet50_2", (1, 2, 3), (64, 64), True),
        ("convnext_tiny", (0, 1, 2), (64, 64), True),
        ("xception41", (1, 2), (64, 64), True),
        ("vit_tiny_patch16_224", (2, 5), (224, 224), True),
        ("swin_tiny_patch4_window7_224", (0, 1), (224, 224), True),
        ("hrnet_w18_small", (1, 2), (64, 64), False),
    ],
)
def test_features_are_bit_equal_to_timms_own(
    name: str, levels: tuple[int, ...], size: tuple[int, int], truncated: bool
) -> None:
    images = random_images(size)
    whole, expected = timm_features(name, 5, images)
    backbone = create_backbone(name, levels, "random", seed=5, standardize="none")
    with torch.inference_mode():
        features = backbone(images)
    assert len(features) == len(levels)
    for level, feature, channels, stride in zip(levels, features, backbone.channels, backbone.strides, strict=True):
        assert torch.equal(feature, expected[level])
        assert feature.shape[1] == channels == whole.feature_info.info[level]["num_chs"]
        assert stride == whole.feature_info.info[level]["reduction"]
    dropped = sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in backbone.parameters())
    assert (dropped > 0) is (truncated and levels != (4,))


def test_the_default_model_is_the_papers_and_drops_31_of_39_million_parameters() -> None:
    backbone = create_backbone(weights="random", standardize="none")
    assert backbone.channels == (40, 72, 200)
    assert backbone.strides == (4, 8, 16)
    whole = timm.create_model("tf_efficientnet_b6", features_only=True)
    dropped = sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in backbone.parameters())
    assert dropped == 31_523_540


def test_it_stays_frozen_and_in_evaluation_mode() -> None:
    backbone = small().train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    before = backbone.fingerprint()
    backbone(random_images((64, 64)))
    assert backbone.fingerprint() == before
    backbone.fit([random_images((64, 64))])
    assert not backbone.needs_fit
    assert backbone.fingerprint() == before


def test_floats_and_bytes_give_the_same_features() -> None:
    backbone, images = small(), random_images((64, 64))
    for from_bytes, from_floats in zip(backbone(images), backbone(images.float() / 255), strict=True):
        assert torch.equal(from_bytes, from_floats)


def test_an_image_alone_or_in_a_batch_gives_the_same_features() -> None:
    backbone, images = small(), random_images((64, 96), batch=3)
    together = backbone(images)
    for index in range(3):
        for alone, batched in zip(backbone(images[index : index + 1]), together, strict=True):
            torch.testing.assert_close(alone[0], batched[index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close_to_single(dtype: str) -> None:
    images = random_images((64, 64))
    for half, single in zip(small(dtype=dtype)(images), small()(images), strict=True):
        assert half.dtype == getattr(torch, dtype)
        assert (half.float() - single).norm() < 0.05 * single.norm()


def test_compiling_keeps_the_names_and_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    # The default compiler takes most of a minute for this model; tracing alone shows that it can be compiled.
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend="eager", fullgraph=True))
    eager = create_backbone(SMALL, (0,), "random", standardize="none")
    compiled = create_backbone(SMALL, (0,), "random", compile=True, standardize="none")
    assert list(compiled.state_dict()) == list(eager.state_dict())
    assert compiled.config() == eager.config()
    images = random_images((32, 32))
    torch.testing.assert_close(compiled(images), eager(images), rtol=1e-4, atol=1e-5)


def test_random_weights_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    same, again, other = small(seed=3), small(seed=3), small(seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert same.fingerprint() == again.fingerprint() != other.fingerprint()


def test_the_fingerprint_covers_weights_and_configuration() -> None:
    backbone = small()
    original = backbone.fingerprint()
    with torch.no_grad():
        next(backbone.parameters())[0, 0, 0, 0] += 1e-3
    assert backbone.fingerprint() != original
    assert create_backbone(SMALL, (1, 2), "random", standardize="none").fingerprint() != original
    assert small(dtype="bfloat16").fingerprint() != original


def test_the_configuration_builds_the_backbone_again() -> None:
    backbone = create_backbone(SMALL, (1, 3), "random", seed=8, dtype="bfloat16", standardize="none")
    again = create_backbone(**json.loads(json.dumps(backbone.config())), weights="random")
    again.load_state_dict(backbone.state_dict())
    assert again.fingerprint() == backbone.fingerprint()


# Weights from a file.


@pytest.mark.parametrize("name", [SMALL, "resnet18", "convnext_atto", "vit_tiny_patch16_224", "xception41"])
def test_the_weights_of_a_whole_model_load_from_a_file(name: str, tmp_path: Path) -> None:
    levels = (1, 3) if name.startswith("vit") else (1, 2)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = timm.create_model(name)
    # Statistics of batches are 0 and 1 at the start, whichever file they come from: make them tell.
    for key, buffer in model.named_buffers():
        if key.endswith(("running_mean", "running_var")):
            buffer.add_(torch.linspace(0, 1, buffer.numel()))
    state = model.state_dict()
    file = f"{tmp_path}/weights.safetensors"
    save_file(state, file)
    backbone = create_backbone(name, levels, file, standardize="none")
    loaded = {value.contiguous().numpy().tobytes() for value in state.values()}
    for key, value in backbone.state_dict().items():
        assert value.contiguous().numpy().tobytes() in loaded, key
    assert backbone.fingerprint() != create_backbone(name, levels, "random", standardize="none").fingerprint()

    for wrapper in ("state_dict", "model"):
        torch.save({wrapper: {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, f"{tmp_path}/w.pth")
        assert (
            create_backbone(name, levels, f"{tmp_path}/w.pth", standardize="none").fingerprint()
            == backbone.fingerprint()
        )
    # And the file of a feature extractor, whose modules timm has renamed.
    torch.save(backbone.net.state_dict(), f"{tmp_path}/features.pt")
    assert (
        create_backbone(name, levels, f"{tmp_path}/features.pt", standardize="none").fingerprint()
        == backbone.fingerprint()
    )


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    state = timm.create_model(SMALL).state_dict()
    file = f"{tmp_path}/weights.pth"
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=r"weights\.pth lacks \d+ of \d+ tensors of resnet18: conv1\.weight, "):
        create_backbone("resnet18", weights=file, standardize="none")
    with pytest.raises(CheckpointError, match=r"other shapes than mobilenetv3_small_075 .* instead of"):
        create_backbone("mobilenetv3_small_075", weights=file, standardize="none")
    key = "blocks.1.0.conv_pw.weight"
    torch.save({**state, key: state[key] * float("nan")}, file)
    with pytest.raises(CheckpointError, match=r"NaN or Inf in blocks\.1\.0\.conv_pw\.weight"):
        small(file)


def test_counters_of_batches_may_be_missing_and_cut_off_stages_too(tmp_path: Path) -> None:
    state = timm.create_model(SMALL).state_dict()
    file = f"{tmp_path}/weights.pth"
    wanted = {key: value for key, value in state.items() if not key.startswith(("blocks.4", "blocks.5", "conv_head"))}
    torch.save({key: value for key, value in wanted.items() if "num_batches" not in key}, file)
    backbone = small(file)
    assert torch.equal(backbone.state_dict()["net.conv_stem.weight"], state["conv_stem.weight"])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_damaged_file_is_one_clear_error(suffix: str, tmp_path: Path) -> None:
    file = f"{tmp_path}/weights{suffix}"
    state = timm.create_model(SMALL).state_dict()
    torch.save(state, file) if suffix == ".pth" else save_file(state, file)
    with open(file, "rb") as whole:
        content = whole.read()
    for broken in (content[: len(content) // 2], b"", b"not weights at all", content[:8] + bytes(64)):
        with open(file, "wb") as damaged:
            damaged.write(broken)
        with pytest.raises(CheckpointError, match=r"weights\.(pth|safetensors).*damaged"):
            small(file)


def test_files_with_anything_but_tensors_are_refused(tmp_path: Path) -> None:
    file = f"{tmp_path}/weights.pth"
    torch.save(nn.Linear(2, 2), file)
    with pytest.raises(CheckpointError, match="Python objects besides tensors"):
        small(file)
    for content in ([1, 2], {}, {"state_dict": 3}, torch.zeros(3)):
        torch.save(content, file)
        with pytest.raises(CheckpointError, match="holds no dict of tensors"):
            small(file)
    with pytest.raises(CheckpointError, match=r"no weights file .*absent\.pth"):
        small(f"{tmp_path}/absent.pth")


# Pretrained weights from the hub.


def test_an_unreachable_hub_fails_fast_and_names_the_other_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("name or service not known\nsecond line")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(timm, "create_model", _without_pretrained(timm.create_model))
    start = time.perf_counter()
    with pytest.raises(BackboneError) as caught:
        create_backbone(SMALL, standardize="none")
    assert time.perf_counter() - start < 5
    message = str(caught.value)
    assert f"pretrained weights of {SMALL} from the hub (name or service not known)" in message
    assert "--weights FILE" in message
    assert "--weights random" in message
    assert "\n" not in message


def test_an_error_during_the_download_is_the_same_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def break_off(*_: object, **options: object) -> nn.Module:
        if options.get("pretrained"):
            raise OSError("connection reset")
        return create_model(*_, **options)

    create_model = timm.create_model
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(timm, "create_model", break_off)
    with pytest.raises(BackboneError, match=r"connection reset.*--weights FILE.*--weights random"):
        create_backbone(SMALL, standardize="none")


def test_a_cached_download_is_used_without_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network must not be asked")

    state = timm.create_model(SMALL).state_dict()
    save_file(state, f"{tmp_path}/model.safetensors")
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    cached = f"{tmp_path}/model.safetensors"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: cached)
    assert create_backbone(SMALL, standardize="none").fingerprint() == small(cached).fingerprint()


def test_a_model_without_pretrained_weights_says_so() -> None:
    source = timm.get_pretrained_cfg("resnet18")
    assert source is not None
    name = next(model for model in timm.list_models("resnet*") if not _has_source(model))
    with pytest.raises(BackboneError, match=rf"no pretrained weights for {name}; .*--weights random"):
        weights_module.hub_overlay(name)


def _has_source(model: str) -> bool:
    source = timm.get_pretrained_cfg(model)
    return source is not None and bool(source.hf_hub_id or source.url)


def _without_pretrained(create_model: object) -> object:
    def guarded(*arguments: object, **options: object) -> object:
        assert not options.get("pretrained"), "timm would retry for minutes"
        return create_model(*arguments, **options)  # type: ignore[operator]

    return guarded


# Names, levels and images that cannot work.


def test_unknown_names_levels_and_dtypes_are_one_clear_error() -> None:
    with pytest.raises(BackboneError, match=r"no backbone 'tf_efficientnetb6'.*did you mean .*tf_efficientnet_b6"):
        create_backbone("tf_efficientnetb6", weights="random", standardize="none")
    with pytest.raises(BackboneError, match="list_models"):
        create_backbone("qqqqqqqq", weights="random", standardize="none")
    with pytest.raises(BackboneError, match=r"resnet18 has no pretrained weights 'best'; choose one of a1_in1k"):
        create_backbone("resnet18.best", weights="random", standardize="none")
    for levels in [(1, 5), (2, 1), (1, 1), (), (-1,)]:
        with pytest.raises(BackboneError, match=r"no levels .*0 \(16 channels, stride 2\), .*4 \(576 channels"):
            create_backbone(SMALL, levels, "random", standardize="none")
    with pytest.raises(BackboneError, match="dtype is 'int8'; choose one of"):
        small(dtype="int8")


def test_padding_mean_and_std() -> None:
    """They are part of the configuration where they are not timm's own; test_conversion.py has their arithmetic."""
    usual = create_backbone(
        "resnet18", (1,), "random", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), standardize="none"
    )
    assert usual.config() == {
        "name": "resnet18",
        "levels": [1],
        "dtype": "float32",
        "neighborhood": 1,
        "standardize": "none",
    }
    other = create_backbone("resnet18", (1,), "random", padding_mode="reflect", std=(1, 1, 1), standardize="none")
    assert other.config() == {**usual.config(), "padding_mode": "reflect", "std": [1.0, 1.0, 1.0]}
    images = random_images((32, 32))
    features, reflected = (
        usual(images)[0],
        create_backbone("resnet18", (1,), "random", padding_mode="reflect", standardize="none")(images)[0],
    )
    assert not torch.equal(features, reflected)
    again = create_backbone(**json.loads(json.dumps(other.config())), weights="random")
    assert torch.equal(again(images)[0], other(images)[0])
    assert len({backbone.fingerprint() for backbone in (usual, other)}) == 2
    with pytest.raises(FeatureError, match="at least 8"):
        other(random_images((7, 32)))
    for options, message in (
        ({"padding_mode": "circular"}, "padding_mode is 'circular'; choose one of"),
        ({"mean": (0.5, 0.5)}, r"mean of a backbone is \[0.5, 0.5\]; give three numbers"),
        ({"std": (0.5, 0.5, 0.0)}, "give three positive numbers"),
    ):
        with pytest.raises(BackboneError, match=message):
            small(**options)  # type: ignore[arg-type]
    with pytest.raises(BackboneError, match="pads in a way of its own"):
        create_backbone("tf_efficientnet_b0", (1,), "random", padding_mode="reflect", standardize="none")
    with pytest.raises(BackboneError, match="gabor backbone knows no other padding"):
        create_backbone("gabor", padding_mode="reflect")


def test_a_model_without_feature_maps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_features(*_: object, **__: object) -> nn.Module:
        raise RuntimeError("features_only not implemented for this model")

    monkeypatch.setattr(timm, "create_model", no_features)
    with pytest.raises(BackboneError, match=r"no feature maps of mobilenetv3_small_100 \(features_only not impl"):
        small()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 64, 64), r"shape \[3, 64, 64\]"),
        (torch.zeros(1, 1, 64, 64), r"shape \[1, 1, 64, 64\]"),
        (torch.zeros(0, 3, 64, 64), "no image"),
        (torch.zeros(1, 3, 15, 64), "15 x 64 pixels are too small .* at least 16"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int64), r"torch\.int64"),
        (torch.full((1, 3, 64, 64), 255.0), "span 255 to 255"),
        (torch.full((1, 3, 64, 64), float("nan")), "span nan"),
        (torch.full((1, 3, 64, 64), float("inf")), "span inf"),
    ],
)
def test_images_that_cannot_be_used_are_refused(images: Tensor, message: str) -> None:
    with pytest.raises(FeatureError, match=message):
        small()(images)


def test_a_model_of_one_image_size_names_it() -> None:
    backbone = create_backbone("vit_tiny_patch16_224", (1,), "random", standardize="none")
    with pytest.raises(FeatureError, match="takes images of 224 x 224 pixels only, not 192 x 224"):
        backbone(random_images((192, 224)))
