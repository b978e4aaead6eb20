"""brisk/eval_drawing.py: what is drawn, by which process, what is kept and what is drawn anew."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from brisk import eval_drawing, image_folder, protocols
from brisk.options import UserError

pytestmark = pytest.mark.quick


class Process(SimpleNamespace):
    """Stands for accelerate's PartialState in a process of its own."""

    def __init__(self, rank=0, world=1):
        super().__init__(process_index=rank, num_processes=world, is_main_process=rank == 0, wait_for_everyone=lambda: None)


class Plan:
    """Draws flat images of the colour (seed, length of the condition, 0) and remembers the batches."""

    def __init__(self):
        self.batches = []

    def draw(self, conditions, seeds):
        self.batches.append(list(seeds))
        sizes = [len(str(text)) for text in conditions] if conditions else [0] * len(seeds)
        return np.stack([np.full((4, 4, 3), (seed, size, 0), np.uint8) for seed, size in zip(seeds, sizes, strict=True)])


CAPTIONS = protocols.PROTOCOLS["custom"]._replace(samples=5, seeds=2, first_seed=3)


def run(folder, plan, protocol=CAPTIONS, rank=0, world=1, batch_size=4, settings=None, prompts="abcdef"):
    asked = eval_drawing.wanted(protocol, "prompts", prompts=[text * 2 for text in prompts])
    state = Process(rank, world)
    stale = eval_drawing.prepare(folder, settings or {"weights": "w"}, asked, state)
    files = eval_drawing.files_of(folder, protocol, asked.seeds)
    eval_drawing.draw(plan, asked, files, batch_size, state, protocol.jpeg)
    return files, stale


def test_every_set_has_its_own_seeds_and_the_same_captions():
    asked = eval_drawing.wanted(CAPTIONS, "prompts", prompts=list("abcdef"))
    assert asked.seeds == list(range(3, 13)) and asked.conditions == list("abcde") * 2


def test_classes_are_balanced():
    asked = eval_drawing.wanted(protocols.PROTOCOLS["cifar10_50k"], "classes", classes=10)
    assert np.bincount(asked.conditions).tolist() == [5000] * 10 and asked.seeds[-1] == 49999


def test_handwriting_captions_and_their_labels_belong_together():
    protocol = protocols.PROTOCOLS["builtin"]._replace(samples=3)
    asked = eval_drawing.wanted(protocol, "prompts")
    assert len(asked.labels) == 3 and len(asked.conditions) == 9
    from brisk import handwriting

    read = [handwriting.parse_caption(text) for text in asked.conditions[3:6]]
    assert read == list(zip(*(column.tolist() for column in asked.labels[1]), strict=True))
    assert asked.conditions[:3] != asked.conditions[3:6]


def test_one_process_and_two_draw_the_same_batches_once_each(tmp_path):
    alone, first, second = Plan(), Plan(), Plan()
    files, _ = run(tmp_path / "one", alone)
    run(tmp_path / "two", first, world=2)
    others, _ = run(tmp_path / "two", second, rank=1, world=2)
    assert sorted(first.batches + second.batches) == alone.batches and len(alone.batches) == 3
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(files, others, strict=True))
    assert np.asarray(Image.open(files[6]))[0, 0].tolist() == [9, 2, 0]


def test_only_batches_with_a_missing_image_are_drawn_again(tmp_path):
    files, _ = run(tmp_path, Plan())
    files[5].unlink()
    again = Plan()
    run(tmp_path, again)
    assert again.batches == [[7, 8, 9, 10]] and files[5].exists()


def test_images_of_other_settings_are_drawn_anew(tmp_path):
    run(tmp_path, Plan())
    again = Plan()
    _, stale = run(tmp_path, again, settings={"weights": "other"})
    assert stale and len(again.batches) == 3


def test_images_of_other_captions_are_drawn_anew_and_the_others_kept(tmp_path):
    run(tmp_path, Plan(), batch_size=1)
    again = Plan()
    _, stale = run(tmp_path, again, batch_size=1, prompts="abcdx")
    assert stale and again.batches == [[7], [12]]


def test_a_seed_that_comes_to_have_another_caption_is_drawn_anew(tmp_path):
    """Image j of a set has caption j: another first seed shifts captions against seeds."""
    run(tmp_path, Plan(), batch_size=1)
    again = Plan()
    files, _ = run(tmp_path, again, CAPTIONS._replace(first_seed=4), batch_size=1)
    assert again.batches == [[seed] for seed in range(4, 14)]
    assert run(tmp_path, Plan(), CAPTIONS._replace(samples=3, first_seed=4))[1], "seeds of the second set have moved"


def test_fewer_samples_of_one_set_keep_their_images(tmp_path):
    one = CAPTIONS._replace(seeds=1)
    run(tmp_path, Plan(), one)
    again = Plan()
    files, stale = run(tmp_path, again, one._replace(samples=3))
    assert not stale and again.batches == [] and len(files) == 3


def test_images_of_the_same_settings_are_kept(tmp_path):
    run(tmp_path, Plan())
    again = Plan()
    _, stale = run(tmp_path, again)
    assert not stale and again.batches == []


def test_jpeg_files_are_written_where_the_protocol_says_so(tmp_path):
    files, _ = run(tmp_path, Plan(), CAPTIONS._replace(jpeg=75))
    assert files[0].suffix == ".jpg" and Image.open(files[0]).format == "JPEG"
    assert not image_folder.pictures_in(tmp_path)  # no PNG beside them


def test_a_disk_error_is_not_swallowed(tmp_path):
    (tmp_path / "000000").write_text("a file where the folder of images goes")
    with pytest.raises(OSError):
        run(tmp_path, Plan())


@pytest.mark.parametrize(("name", "takes", "classes", "prompts", "message"), [
    ("coco2017_5k", "prompts", None, None, "give --prompt_file .one caption of each"),
    ("coco2017_5k", "prompts", None, ["a"] * 10, "needs 5,000 captions, --prompt_file has 10; give --samples 10"),
    ("builtin", "classes", 10, None, "takes classes; .*builtin_classes"),
    ("builtin", None, None, None, "takes no captions; the protocol builtin"),
    ("builtin_classes", None, None, None, "takes no classes"),
])  # fmt: skip
def test_models_that_do_not_fit_the_protocol(name, takes, classes, prompts, message):
    with pytest.raises(UserError, match=message):
        eval_drawing.wanted(protocols.PROTOCOLS[name], takes, classes, prompts)
