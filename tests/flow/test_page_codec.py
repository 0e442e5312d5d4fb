import dataclasses
import hashlib

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from sglang_kvcodec.errors import ChecksumError, CodecError, ForeignPageError, FormatError, UnsupportedError
from sglang_kvcodec.flow.page_codec import GroupDecoder, PageEncoder
from sglang_kvcodec.format.digest import plane_digest
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import GroupData, PageObject, PicturePart, SideData, build_page_object
from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side, layer_groups
from sglang_kvcodec.testing.calibrations import neox_rope, random_calibration
from sglang_kvcodec.testing.rehearsal import RehearsalDriver, RehearsalLibrary, addresses_to_canvases
from sglang_kvcodec.testing.synthetic import page_values, random_bits
from sglang_kvcodec.transform import PageTransforms
from sglang_kvcodec.transform.floats import to_bits
from sglang_kvcodec.video import open_decoder, open_encoder
from sglang_kvcodec.video.bitstream import LEVEL_6_2, nal_units, to_annexb, with_level
from sglang_kvcodec.video.nvdec import NvdecDecoder
from sglang_kvcodec.video.software import SoftwareEncoder

NAMESPACE = hashlib.sha256(b"namespace").digest()
MOST_VALUES = 250_000
"""Of one example, so that the property test stays fast."""


def page_hash(number):
    return hashlib.sha256(b"page %d" % number).digest()


def encoder_for(spec, profile):
    return PageEncoder(NAMESPACE, PageTransforms(spec, profile), None if profile == "raw" else open_encoder("software"))


def decoder_for(spec, profile):
    return GroupDecoder(PageTransforms(spec, profile), None if profile == "raw" else open_decoder("software"))


def encode_pages(spec, profile, pages):
    encoder = encoder_for(spec, profile)
    objects = [encoder.encode(page_hash(number), values) for number, values in enumerate(pages)]
    return [PageObject(data, PageKey(NAMESPACE, page_hash(number))) for number, data in enumerate(objects)]


def assert_restores(spec, profile, pages, objects):
    decoder = decoder_for(spec, profile)
    for group in layer_groups(spec):
        for side in spec.sides:
            restored = decoder.decode(objects, group.index, side)
            original = torch.stack([page[side][group.first_layer : group.first_layer + group.layers] for page in pages])
            assert restored.shape == original.shape
            assert restored.dtype == original.dtype
            if profile == "high":
                wide = original.double()
                noise = ((restored.double() - wide) ** 2).sum((2, 3, 4))
                assert (noise <= 1e-3 * ((wide - wide.mean(2, keepdim=True)) ** 2).sum((2, 3, 4))).all()
            else:
                assert torch.equal(to_bits(restored), to_bits(original))


@st.composite
def specs(draw):
    head_dim = draw(st.sampled_from([64, 80, 96, 128, 192, 256]))
    page_tokens = draw(st.sampled_from([16, 17, 32, 48, 64, 100, 128, 256]))
    kv_heads = draw(st.integers(1, max(1, min(32, MOST_VALUES // (2 * head_dim * page_tokens)))))
    layers = draw(st.integers(1, max(1, min(10, MOST_VALUES // (2 * head_dim * page_tokens * kv_heads)))))
    sides = draw(st.sampled_from([(Side.KEY, Side.VALUE), (Side.KEY, Side.VALUE), (Side.LATENT,)]))
    return KVSpec(layers, kv_heads, head_dim, page_tokens, draw(st.sampled_from(KVDtype)), sides)


@hypothesis.settings(max_examples=60, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(spec=specs(), profile=st.sampled_from(["raw", "exact", "high"]), seed=st.integers(0, 1000))
@hypothesis.example(KVSpec(1, 32, 256, 16, KVDtype.BFLOAT16), "exact", 0)
@hypothesis.example(KVSpec(1, 1, 64, 16, KVDtype.BFLOAT16), "high", 0)
@hypothesis.example(KVSpec(10, 1, 64, 16, KVDtype.FLOAT16), "exact", 0)
@hypothesis.example(KVSpec(7, 2, 80, 100, KVDtype.FLOAT8_E5M2), "exact", 0)
@hypothesis.example(KVSpec(5, 1, 128, 256, KVDtype.FLOAT16), "high", 0)
@hypothesis.example(KVSpec(4, 1, 576, 64, KVDtype.BFLOAT16, (Side.LATENT,)), "exact", 0)
def test_every_geometry_comes_back(spec, profile, seed):
    try:
        encoder_for(spec, profile)
    except UnsupportedError:
        assert profile == "high"
        assert spec.dtype.item_bytes == 1
        return
    pages = [page_values(spec, seed)]
    assert_restores(spec, profile, pages, encode_pages(spec, profile, pages))


SPEC = KVSpec(4, 2, 128, 64, KVDtype.BFLOAT16)


@pytest.mark.parametrize("profile", ["raw", "exact", "high"])
def test_many_pages_in_one_call(profile):
    pages = [page_values(SPEC, seed) for seed in range(5)]
    objects = encode_pages(SPEC, profile, pages)
    assert len(layer_groups(SPEC)) == 2
    assert_restores(SPEC, profile, pages, objects)
    assert_restores(SPEC, profile, pages[::-2], objects[::-2])


@pytest.mark.parametrize("dtype", KVDtype)
def test_exact_keeps_any_bits(dtype):
    spec = dataclasses.replace(SPEC, dtype=dtype)
    shape = (spec.layers, spec.page_tokens, spec.kv_heads, spec.head_dim)
    pages = [{side: random_bits(dtype, shape, seed) for seed, side in enumerate(spec.sides)}]
    assert_restores(spec, "exact", pages, encode_pages(spec, "exact", pages))


@pytest.mark.parametrize("profile", ["raw", "exact", "high"])
def test_the_same_page_gives_the_same_bytes(profile):
    values = page_values(SPEC, 1)
    first, second = encoder_for(SPEC, profile), encoder_for(SPEC, profile)
    second.encode(page_hash(9), page_values(SPEC, 2))
    assert first.encode(page_hash(0), values) == second.encode(page_hash(0), values)


@pytest.mark.parametrize("profile", ["raw", "exact", "high"])
def test_without_a_calibration_the_position_is_no_part_of_the_page(profile):
    values, encoder = page_values(SPEC, 1), encoder_for(SPEC, profile)
    coded = encoder.encode(page_hash(0), values, 5 * SPEC.page_tokens)
    assert coded == encoder.encode(page_hash(0), values)
    assert PageObject(coded).header.first_position == 0


class CountingDecoder:
    """Counts the calls of a real decoder."""

    name = "counting"

    def __init__(self):
        self._decoder = open_decoder("software")
        self.calls = []

    def decode(self, parameter_sets, pictures):
        self.calls.append(len(pictures))
        return self._decoder.decode(parameter_sets, pictures)

    def close(self):
        self._decoder.close()


def rebuilt(page, change_side, parameter_sets=None):
    """The page with its first side of its first group changed, and every checksum in order again."""
    header = page.header
    groups: list[GroupData] = [
        {side: page.side_data(group.index, side) for side in header.spec.sides} for group in layer_groups(header.spec)
    ]
    first = header.spec.sides[0]
    groups[0][first] = change_side(groups[0][first])
    sets = page.parameter_sets if parameter_sets is None else parameter_sets
    return PageObject(build_page_object(header.key, header.spec, header.profile_name, groups, sets))


def test_one_decode_call_for_all_pages_with_the_same_parameter_sets():
    objects = encode_pages(SPEC, "exact", [page_values(SPEC, seed) for seed in range(4)])
    decoder = CountingDecoder()
    GroupDecoder(PageTransforms(SPEC, "exact"), decoder).decode(objects, 0, Side.KEY)
    assert decoder.calls == [4]
    # Another level changes nothing but the bytes.
    vps, sps, pps = nal_units(objects[1].parameter_sets)
    sets = to_annexb([with_level(vps, LEVEL_6_2 - 3), with_level(sps, LEVEL_6_2 - 3), pps])
    other = rebuilt(objects[1], lambda side: side, sets)
    decoder.calls.clear()
    mixed = [objects[0], other, objects[2], objects[3]]
    assert torch.equal(
        GroupDecoder(PageTransforms(SPEC, "exact"), decoder).decode(mixed, 0, Side.KEY),
        GroupDecoder(PageTransforms(SPEC, "exact"), decoder).decode(objects, 0, Side.KEY),
    )
    assert decoder.calls == [3, 1, 4]


@pytest.mark.parametrize("use", [GroupDecoder.decode, lambda *arguments: list(GroupDecoder.decode_frames(*arguments))])
def test_parameter_sets_of_another_size_reach_no_decoder(use):
    page = encode_pages(SPEC, "exact", [page_values(SPEC, 0)])[0]
    larger = SoftwareEncoder().encode(np.zeros((1, 1536, 8192), np.uint8)).parameter_sets
    decoder = CountingDecoder()
    with pytest.raises(CodecError, match="8192x1024 are stated"):
        use(
            GroupDecoder(PageTransforms(SPEC, "exact"), decoder),
            [rebuilt(page, lambda side: side, larger)],
            0,
            Side.KEY,
        )
    assert decoder.calls == []


@pytest.mark.parametrize("profile", ["exact", "high"])
def test_a_picture_that_decodes_to_other_planes_names_its_page(profile):
    objects = encode_pages(SPEC, profile, [page_values(SPEC, seed) for seed in range(2)])

    def other_digest(side):
        return dataclasses.replace(
            side, picture=dataclasses.replace(side.picture, plane_digest=side.picture.plane_digest ^ 1)
        )

    damaged = rebuilt(objects[1], other_digest)
    with pytest.raises(ChecksumError, match=page_hash(1).hex()[:12]):
        decoder_for(SPEC, profile).decode([objects[0], damaged], 0, Side.KEY)


@pytest.mark.parametrize("profile", ["exact", "high"])
def test_damaged_pictures_under_good_checksums_are_never_accepted(profile):
    """As if the damage had been there when the checksums were made: only the plane digest can tell."""
    page = encode_pages(SPEC, profile, [page_values(SPEC, 0)])[0]
    decoder, rng = decoder_for(SPEC, profile), np.random.default_rng(0)
    sound = decoder.decode([page], 0, Side.KEY)

    for number in range(40):

        def damage(side, number=number):
            data = bytearray(side.picture.data)
            if number % 4 == 0:
                data = data[: rng.integers(len(data))]
            else:
                data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
            return dataclasses.replace(side, picture=dataclasses.replace(side.picture, data=bytes(data)))

        try:
            restored = decoder.decode([rebuilt(page, damage)], 0, Side.KEY)
        except (CodecError, FormatError):
            continue
        assert torch.equal(to_bits(restored), to_bits(sound))


def test_pictures_of_another_size_are_refused():
    page = encode_pages(SPEC, "exact", [page_values(SPEC, 0)])[0]
    encoded = open_encoder("software").encode(np.zeros((1, 576, 256), np.uint8))
    foreign = rebuilt(
        page,
        lambda side: dataclasses.replace(side, picture=PicturePart(encoded.pictures[0], 0)),
        encoded.parameter_sets,
    )
    with pytest.raises(CodecError, match="pictures of"):
        decoder_for(SPEC, "exact").decode([foreign], 0, Side.KEY)


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(SPEC, layers=5),
        dataclasses.replace(SPEC, kv_heads=4, head_dim=64),
        dataclasses.replace(SPEC, page_tokens=32),
        dataclasses.replace(SPEC, dtype=KVDtype.FLOAT16),
        dataclasses.replace(SPEC, sides=(Side.KEY,)),
    ],
)
def test_pages_of_another_spec_are_refused(other):
    objects = encode_pages(SPEC, "raw", [page_values(SPEC, 0)])
    foreign = encode_pages(other, "raw", [page_values(other, 0)])
    with pytest.raises(ForeignPageError):
        decoder_for(SPEC, "raw").decode(objects + foreign, 0, Side.KEY)


def test_pages_of_another_profile_or_calibration_are_refused():
    values = page_values(SPEC, 0)
    with pytest.raises(ForeignPageError, match="'exact'"):
        decoder_for(SPEC, "high").decode(encode_pages(SPEC, "exact", [values]), 0, Side.KEY)
    coded = CalibratedPages(random_calibration(SPEC))
    other = PageTransforms(SPEC, "high", [random_calibration(SPEC, seed=1)])
    for transforms in (PageTransforms(SPEC, "high"), other):
        with pytest.raises(ForeignPageError, match="calibration"):
            GroupDecoder(transforms, open_decoder("software")).decode([coded.page(values, 0)], 0, Side.KEY)


class CalibratedPages:
    """Pages of one calibration, coded and read back."""

    def __init__(self, calibration, spec=SPEC):
        self.transforms = PageTransforms(spec, "high", [calibration])
        coding = self.transforms.codings(calibration.digest)[0]
        self.encoder = PageEncoder(NAMESPACE, self.transforms, open_encoder("software"), coding)
        self.decoder = GroupDecoder(self.transforms, open_decoder("software"))

    def page(self, values, first_position):
        return PageObject(self.encoder.encode(page_hash(first_position), values, first_position))


def test_calibrated_pages_come_back_within_their_steps_and_say_what_they_need():
    calibration = random_calibration(SPEC, step=0.01, rope=neox_rope(SPEC.head_dim))
    coded = CalibratedPages(calibration)
    values = [page_values(SPEC, seed) for seed in range(3)]
    pages = [coded.page(page, 1000 * index) for index, page in enumerate(values)]
    assert {page.header.calibration_digest for page in pages} == {calibration.digest}
    assert [page.header.first_position for page in pages] == [0, 1000, 2000]
    for group in layer_groups(SPEC):
        for side in SPEC.sides:
            restored = coded.decoder.decode(pages, group.index, side).float()
            layers = slice(group.first_layer, group.first_layer + group.layers)
            expected = torch.stack([page[side][layers] for page in values]).float()
            assert float((restored - expected).abs().max()) < 0.02 + 2**-7 * float(expected.abs().max())


def test_a_page_that_the_tier_can_not_code_is_coded_exact_among_the_others():
    coded = CalibratedPages(random_calibration(SPEC, step=0.01))
    values = [page_values(SPEC, seed) for seed in range(3)]
    values[1][Side.VALUE][0, 3, 0, 2] = float("nan")
    pages = [coded.page(page, 64 * index) for index, page in enumerate(values)]
    assert [page.header.profile_name for page in pages] == ["high", "exact", "high"]
    restored = coded.decoder.decode(pages, 0, Side.VALUE)
    group = layer_groups(SPEC)[0]
    assert torch.equal(to_bits(restored[1]), to_bits(values[1][Side.VALUE][: group.layers]))
    assert float((restored[2].float() - values[2][Side.VALUE][: group.layers].float()).abs().max()) < 0.5


@pytest.mark.parametrize("position", [1, (1 << 32) + 1])
def test_positions_that_are_none_are_refused(position):
    """A page of a profile that has no position, and one beyond any context."""
    page = encode_pages(SPEC, "raw", [page_values(SPEC, 0)])[0]
    groups = [{side: page.side_data(group.index, side) for side in SPEC.sides} for group in layer_groups(SPEC)]
    with pytest.raises(FormatError):
        PageObject(build_page_object(page.header.key, SPEC, "raw", groups, first_position=position))


@pytest.mark.parametrize("profile", ["raw", "exact", "high"])
def test_parts_that_do_not_fit_the_profile_are_refused(profile):
    page = encode_pages(SPEC, profile, [page_values(SPEC, 0)])[0]
    decoder = decoder_for(SPEC, profile)
    side = page.side_data(0, Side.KEY)
    changes = [
        lambda side: dataclasses.replace(side, stored=side.stored[:-1] or b"\0"),
        lambda side: dataclasses.replace(side, escapes=b"\0"),
        lambda side: SideData(None, side.stored, b"\1"),
    ]
    if side.picture is not None:
        changes.append(lambda side: dataclasses.replace(side, picture=dataclasses.replace(side.picture, steps=(1.0,))))
    for change in changes:
        with pytest.raises(FormatError):
            decoder.decode([rebuilt(page, change)], 0, Side.KEY)


def test_a_coded_profile_without_codec_is_the_callers_mistake():
    with pytest.raises(ValueError, match="needs an encoder"):
        PageEncoder(NAMESPACE, PageTransforms(SPEC, "exact"), None)
    with pytest.raises(ValueError, match="need a decoder"):
        GroupDecoder(PageTransforms(SPEC, "high"), None)


FRAMED = KVSpec(layers=4, kv_heads=3, head_dim=64, page_tokens=43, dtype=KVDtype.BFLOAT16)


@pytest.mark.parametrize("profile", ["exact", "high"])
def test_frames_are_left_where_an_engine_decoded_them(profile):
    """With an engine as it is rehearsed: what lies at the addresses is what the digests in the pages say."""
    library, driver = RehearsalLibrary(pitch_padding=16), RehearsalDriver()
    pages = encode_pages(FRAMED, profile, [page_values(FRAMED, seed=n) for n in range(5)])
    decoder = GroupDecoder(PageTransforms(FRAMED, profile), NvdecDecoder(library, driver))
    (segment,) = decoder.decode_frames(pages, 0, Side.KEY)
    frames = segment.frames
    assert list(segment.members) == [0, 1, 2, 3, 4]
    canvases = addresses_to_canvases(
        frames.luma_addresses, frames.chroma_addresses, frames.pitch_bytes, frames.width, frames.height
    )
    assert [plane_digest(canvas) for canvas in canvases] == [data.picture.plane_digest for data in segment.data]
    values = decoder.decode(pages, 0, Side.KEY)
    assert torch.equal(to_bits(values), to_bits(decoder_for(FRAMED, profile).decode(pages, 0, Side.KEY)))


def test_a_decoder_that_gave_wrong_planes_is_replaced(monkeypatch):
    library, driver = RehearsalLibrary(), RehearsalDriver()
    (page,) = encode_pages(FRAMED, "exact", [page_values(FRAMED, seed=0)])
    decoder = GroupDecoder(PageTransforms(FRAMED, "exact"), NvdecDecoder(library, driver))
    with monkeypatch.context() as broken:
        broken.setattr(driver, "copy_to_host", lambda target, *rest: target.fill(7))
        with pytest.raises(ChecksumError):
            decoder.decode([page], 0, Side.KEY)
    decoder.decode([page], 0, Side.KEY)
    assert len(library.created) == 2
