import numpy as np
import pytest
import torch
from kernel_kit import surfaces

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.format.digest import plane_digest
from sglang_kvcodec.kernels import check_digest, digest
from sglang_kvcodec.kernels.digest import pictures_differ, plane_digests
from sglang_kvcodec.kernels.planes import Planes, planes_of

# NumPy, which interprets the kernels, warns where the sum wraps around, as it should.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def pictures(count, width, height, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, height * 3 // 2, width), generator=generator).to(torch.uint8)


@pytest.mark.parametrize(("count", "width", "height"), [(3, 192, 192), (1, 4, 2), (2, 68, 46), (1, 320, 256)])
def test_digests_are_those_of_page_objects(count, width, height, device):
    canvases = pictures(count, width, height)
    digests = plane_digests(planes_of(canvases.to(device)), width, height)
    assert [int(each) % 2**64 for each in digests.cpu()] == [plane_digest(canvas.numpy()) for canvas in canvases]


@pytest.mark.parametrize("pitch", [192, 256, 199])
def test_what_lies_between_rows_does_not_count(pitch, device):
    canvases = pictures(2, 192, 64)
    planes = surfaces(canvases, pitch, device)
    digests = [plane_digest(canvas.numpy()) for canvas in canvases]
    assert pictures_differ(planes, 192, 64, digests).tolist() == [False, False]


def test_one_wrong_bit_is_found_in_its_picture(device):
    canvases = pictures(3, 64, 32)
    digests = [plane_digest(canvas.numpy()) for canvas in canvases]
    for row in (0, 31, 32, 47):
        spoiled = canvases.clone()
        spoiled[1, row, 63] ^= 1
        assert pictures_differ(planes_of(spoiled.to(device)), 64, 32, digests).tolist() == [False, True, False]


def test_the_kernel_passes_its_check_and_another_does_not(device, monkeypatch):
    check_digest((72, 64), torch.device(device))
    monkeypatch.setattr(digest, "pictures_differ", lambda *args: torch.tensor([False, False, False]))
    with pytest.raises(ConfigurationError, match="does not give the digests"):
        check_digest((72, 64), torch.device(device))


def test_what_does_not_fit_is_refused(device):
    planes = planes_of(pictures(2, 64, 32).to(device))
    for width, height in ((62, 32), (64, 31), (0, 32), (68, 32)):
        with pytest.raises(ValueError, match=r"no digest|planes"):
            plane_digests(planes, width, height)
    with pytest.raises(ValueError, match="1 digests"):
        pictures_differ(planes, 64, 32, [1])
    with pytest.raises(ValueError, match="int64"):
        Planes(planes.luma.to(torch.int32), planes.chroma, 64)
    with pytest.raises(ValueError, match="belong together"):
        Planes(planes.luma, planes.chroma[:1], 64)
    assert np.array_equal(plane_digests(Planes(planes.luma[:0], planes.chroma[:0], 64), 64, 32).cpu(), [])
