"""Page objects of every released format, made once by scripts/make-golden: they must decode for ever."""

import hashlib
import json
import pathlib

import pytest
import torch

from sglang_kvcodec.flow.page_codec import GroupDecoder
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.format.profile import get_profile
from sglang_kvcodec.format.spec import layer_groups
from sglang_kvcodec.transform import PageTransforms
from sglang_kvcodec.video import open_decoder

OBJECTS = sorted(pathlib.Path(__file__).parent.glob("golden/*.kvpo"))


def test_every_profile_and_dtype_is_there():
    profiles = {"raw": 4, "exact": 5, "high": 2}
    names = [path.stem.split("-")[0] for path in OBJECTS]
    assert {name: names.count(name) for name in profiles} == profiles


@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.stem)
def test_a_golden_page_restores_to_the_same_bytes(path):
    page = PageObject(path.read_bytes())
    profile, spec = page.header.profile_name, page.header.spec
    decoder = GroupDecoder(
        PageTransforms(spec, profile), open_decoder("software") if get_profile(profile).has_pictures else None
    )
    digest = hashlib.sha256()
    for group in layer_groups(spec):
        for side in spec.sides:
            digest.update(decoder.decode([page], group.index, side).view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == json.loads(path.with_suffix(".json").read_text())["restored_sha256"]
