"""brisk/protocols.py: what is preset, what flags change, lists of metrics."""

import pytest

from brisk import protocols
from brisk.options import UserError

pytestmark = pytest.mark.quick


def test_a_changed_field_is_named_and_an_equal_one_is_not():
    protocol, changed = protocols.resolve("coco2014_30k", samples=100, guidance_scale=None, resolution=512)
    assert protocol.samples == 100 and protocol.resolution == 512 and changed == ["samples"]


def test_an_unknown_protocol_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="the nearest one is coco2014_30k"):
        protocols.resolve("coco2014-30k")


def test_published_counts():
    counts = {name: protocol.samples for name, protocol in protocols.PROTOCOLS.items()}
    assert counts == {"builtin": 200, "builtin_classes": 200, "coco2014_30k": 30000, "coco2014_30k_bksdm": 30000,
                      "coco2017_5k": 5000, "imagenet_50k": 50000, "imagenet64_50k": 50000, "cifar10_50k": 50000,
                      "ffhq_50k": 50000, "lsun_bedroom_50k": 50000, "rewards_1k": 1000, "custom": None}  # fmt: skip
    bksdm = protocols.PROTOCOLS["coco2014_30k_bksdm"]  # PNDM with 25 steps makes 26 calls
    assert (bksdm.nfe, bksdm.scheduler, bksdm.guidance_scale, bksdm.measured_at, bksdm.jpeg) == ((26,), "pndm", 7.5, 256, 75)


@pytest.mark.parametrize("name", protocols.PROTOCOLS)
def test_metrics_of_protocols_are_known(name):
    protocol = protocols.PROTOCOLS[name]
    assert protocols.read_metrics(",".join(protocol.metrics)) == protocol.metrics
    assert ("fid" in protocol.metrics) <= (protocol.extractor == "inception" and bool(protocol.reference))
    assert name in protocols.listing()


def test_metrics_are_taken_in_their_usual_spellings():
    assert protocols.read_metrics("hps, pick,precision,recall,own.module:score") == ("hps", "pickscore", "pr", "own.module:score")
    with pytest.raises(UserError, match="'fed' is none of .*the nearest one is fid"):
        protocols.read_metrics("fed")
