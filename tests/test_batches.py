"""Shards of any samples, and the batches made of them."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile

import numpy as np
import pytest
import torch

from chebface import native
from chebface.crop import WIDE_MATRIX, WIDE_PX, invert, warp
from chebface.data import align
from chebface.data.batches import Batch, Batches, collate
from chebface.data.sample import Sample, Shards, _list_members, is_held_out, write_shard
from chebface.errors import AssetError, InputError

ACTORS, PHOTOS = 12, (1, 3, 2, 4)  # photos of actors 0, 1, 2, 3, 4 (again 1), ...


def make_sample(index: int, actor: str, parameters: bool = False, landmarks: bool = False) -> Sample:
    rng = np.random.default_rng(index)
    wide = np.full((WIDE_PX, WIDE_PX, 3), index * 5, np.uint8)
    wide[: index + 20, :, 0] = 255
    numbers = rng.normal(size=486).astype(np.float32)
    points = rng.uniform(0, WIDE_PX, (68, 2)).astype(np.float32)
    return Sample(wide, actor, numbers[:300], numbers if parameters else None, points if landmarks else None)


def write_dataset(folder, samples: list[Sample], per_shard: int = 10) -> Shards:
    folder.mkdir(exist_ok=True)
    names = []
    for start in range(0, len(samples), per_shard):
        names.append(f"{len(names):05d}.tar")
        write_shard(folder / names[-1], samples[start : start + per_shard], 95, start)
    (folder / "shards.json").write_text(json.dumps({"shards": names}))
    return Shards(folder)


@pytest.fixture(scope="module")
def samples():
    people = [f"SET/{actor:02d}" for actor in range(ACTORS) for _ in range(PHOTOS[actor % 4])]
    return [make_sample(index, actor, index % 2 == 0, index % 3 == 0) for index, actor in enumerate(people)]


@pytest.fixture(scope="module")
def data(samples, tmp_path_factory):
    with write_dataset(tmp_path_factory.mktemp("data") / "d", samples) as shards:
        yield shards


def assert_same(one: Batch, other: Batch) -> None:
    for field in dataclasses.fields(Batch):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), field.name


def join(shares: list[Batch]) -> Batch:
    names = [field.name for field in dataclasses.fields(Batch)]
    return Batch(**{name: torch.cat([getattr(share, name) for share in shares]) for name in names})


def test_shards_give_back_every_kind_of_sample(data, samples):
    assert data.actors == [sample.actor for sample in samples]
    for got, want in zip([data[i] for i in range(len(data))], samples, strict=True):
        assert got.actor == want.actor
        np.testing.assert_array_equal(got.shape, want.shape)
        for name in ("parameters", "landmarks_px"):
            a, b = getattr(got, name), getattr(want, name)
            assert (a is None) == (b is None)
            assert a is None or np.array_equal(a, b)
        assert np.abs(got.wide_u8.astype(int) - want.wide_u8).mean() < 2


def test_only_what_is_unusual_costs_a_file(tmp_path):
    usual = [make_sample(index, str(index), True, True) for index in range(7, 9)]
    write_shard(tmp_path / "a.tar", usual, 90, first=7)
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getnames() == ["000000.jpg", "000000.npy", "000001.jpg", "000001.npy"]
    write_shard(tmp_path / "b.tar", [make_sample(0, "Ann", True), make_sample(1, "Ann", False, True)], 90)
    with tarfile.open(tmp_path / "b.tar") as tar:
        facts = [json.load(tar.extractfile(f"00000{i}.json")) for i in range(2)]
    assert facts == [{"actor": "Ann", "knows": ["parameters"]}, {"actor": "Ann", "knows": ["shape", "landmarks"]}]


def _replace(path, name: str, content: bytes) -> None:
    with tarfile.open(path) as old:
        blobs = {member.name: old.extractfile(member).read() for member in old.getmembers()}
    with tarfile.open(path, "w") as new:
        for member, blob in (blobs | {name: content}).items():
            entry = tarfile.TarInfo(member)
            entry.size = len(blob)
            new.addfile(entry, io.BytesIO(blob))


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("000001.json", b"{", r"000001\.json is damaged"),
        ("000001.json", b"[]", r"000001\.json is damaged"),
        ("000001.json", b'{"actor": 3, "knows": ["shape"]}', "expected an actor's name"),
        ("000001.json", b'{"actor": "Ann", "knows": ["landmarks"]}', "expected an actor's name"),
        ("000001.json", b'{"actor": "Ann", "knows": ["shape", "shape"]}', "expected an actor's name"),
        ("000001.jpg", b"no picture", "sample 1 is damaged"),
        ("000001.npy", b"no array", "sample 1 is damaged"),
        ("000001.npy", _npy(np.zeros(0, np.float32)), r"numbers \(0,\)"),
        ("000001.npy", _npy(np.zeros(622)), "float64, expected"),
        ("000001.npy", _npy(np.full(622, np.nan, np.float32)), "sample 1 has numbers that are not finite"),
    ],
)
def test_damaged_samples_are_named(tmp_path, name, content, says):
    write_dataset(tmp_path / "d", [make_sample(index, str(index), True, True) for index in range(3)]).close()
    _replace(tmp_path / "d" / "00000.tar", name, content)
    with pytest.raises(AssetError, match=says), Shards(tmp_path / "d") as shards:
        shards[1]


def test_numbers_of_another_writer_are_read_too(tmp_path):
    numbers = np.arange(622, dtype=np.float32)
    file = io.BytesIO()
    np.lib.format.write_array(file, numbers, version=(2, 0), allow_pickle=False)
    write_dataset(tmp_path / "d", [make_sample(0, "0", True, True)]).close()
    _replace(tmp_path / "d" / "00000.tar", "000000.npy", file.getvalue())
    with Shards(tmp_path / "d") as shards:
        np.testing.assert_array_equal(shards[0].parameters, numbers[:486])
        np.testing.assert_array_equal(shards[0].landmarks_px, numbers[486:].reshape(68, 2))


def test_a_shard_is_listed_as_tarfile_does(tmp_path, samples):
    write_shard(tmp_path / "a.tar", samples, 90)
    with tarfile.open(tmp_path / "a.tar") as tar, open(tmp_path / "a.tar", "rb") as file:
        want = {member.name: (member.offset_data, member.size) for member in tar.getmembers()}
        assert _list_members(file.fileno()) == want


def _flip(at: int):
    def change(content: bytearray) -> bytearray:
        content[at] ^= 1
        return content

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda content: b"", "empty"),
        (lambda content: content[:40_000], "truncated: it goes on beyond its 40000 bytes"),
        (lambda content: content[: content.rindex(b"ustar") // 512 * 512], "truncated"),  # whole members, no end
        (lambda content: content[: content.rindex(b"ustar") // 512 * 512 + 100], "no tar, or damaged"),
        (lambda content: b"not a tar" * 999, "no tar, or damaged at byte 0"),
        (_flip(3), "damaged at byte 0"),  # a name
        (_flip(134), "damaged at byte 0|no tar"),  # a size
        (_flip(150), "damaged at byte 0"),  # the sum itself
    ],
)
def test_a_shard_that_is_not_whole_is_named(tmp_path, change, says):
    write_dataset(tmp_path / "d", [make_sample(index, str(index), True, True) for index in range(9)]).close()
    path = tmp_path / "d" / "00000.tar"
    path.write_bytes(change(bytearray(path.read_bytes())))
    with pytest.raises(AssetError, match=rf"00000\.tar: ({says}).*; delete it"):
        Shards(tmp_path / "d")


@pytest.mark.parametrize("odd", [{"type": tarfile.DIRTYPE}, {"type": tarfile.SYMTYPE}, {"name": "x/" * 55 + "1.jpg"}])
def test_a_shard_of_other_things_than_files_is_refused(tmp_path, odd):
    (tmp_path / "shards.json").write_text(json.dumps({"shards": ["a.tar"]}))
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        entry = tarfile.TarInfo("000000.jpg")
        for name, value in odd.items():
            setattr(entry, name, value)
        tar.addfile(entry)
    with pytest.raises(AssetError, match=r"a\.tar: not a plain file of a short name at byte 0"):
        Shards(tmp_path)


@pytest.fixture
def forget():
    """Nothing of what was decided about the native code is kept, before and after."""
    align._why_not.cache_clear()
    yield
    align._why_not.cache_clear()


@pytest.mark.parametrize("why", [None, "no compiler"])
def test_the_network_sees_the_same_picture_as_at_inference(samples, monkeypatch, forget, why):
    if why:
        monkeypatch.setattr(native, "why_missing", lambda source: why)
    elif native.find_compiler() is None:
        pytest.skip("needs a C++ compiler")
    assert align.implementation() == (f"reference ({why})" if why else "native")
    rng = np.random.default_rng(5)
    noise = rng.integers(0, 256, (3, WIDE_PX, WIDE_PX, 3), np.uint8)
    tones = rng.integers(0, 2, (3, WIDE_PX, WIDE_PX, 3), np.uint8) * 36  # every mean a whole number, or nearly
    turned = rng.integers(0, 256, (WIDE_PX, WIDE_PX, 3), np.uint8).swapaxes(0, 1)
    for wide_u8 in (*noise, *tones, turned, *(sample.wide_u8 for sample in samples[:3])):
        want = warp(wide_u8, invert(WIDE_MATRIX), 112)
        np.testing.assert_array_equal(align.align_wide(wide_u8), want)
        sample = dataclasses.replace(samples[0], wide_u8=wide_u8)
        np.testing.assert_array_equal(sample.aligned_u8, want)


def test_native_code_that_rounds_otherwise_is_not_used(monkeypatch, forget):
    if native.find_compiler() is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(align, "align_reference", lambda wide_u8: np.full((112, 112, 3), 7, np.uint8))
    assert align.implementation() == "reference (Pillow rounds otherwise on this machine)"
    assert (align.align_wide(np.zeros((WIDE_PX, WIDE_PX, 3), np.uint8)) == 7).all()


def test_only_a_wide_frame_is_aligned():
    for odd in (np.zeros((112, 112, 3), np.uint8), np.zeros((WIDE_PX, WIDE_PX, 3), np.float32)):
        with pytest.raises(InputError, match=r"wide_u8: expected \(224, 224, 3\) uint8, got"):
            align.align_wide(odd)


def test_an_index_that_is_none_is_named(tmp_path):
    for content in ("{", "[]", "{}"):
        (tmp_path / "shards.json").write_text(content)
        with pytest.raises(AssetError, match=r"shards\.json is not a whole index"):
            Shards(tmp_path)


def test_order_hangs_on_seed_and_step_alone(data):
    whole = list(Batches(data, 4, 0, 0, 9, images_per_actor=2))
    resumed = list(Batches(data, 4, 0, 5, 9, images_per_actor=2, threads=1))
    assert len(whole) == 9
    for one, other in zip(whole[5:], resumed, strict=True):
        assert_same(one, other)
    other_seed = Batches(data, 4, 1, 0, 9, images_per_actor=2)
    assert len(other_seed) == 9
    assert not all(torch.equal(one.actors, other.actors) for one, other in zip(whole, other_seed, strict=True))
    epochs = [torch.cat([batch.actors for batch in whole[i : i + 3]]) for i in (0, 3, 6)]
    assert not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize("world", [2, 4])
def test_shares_of_the_ranks_are_the_batch_of_one_process(data, world):
    alone = Batches(data, 4, 3, 2, 6, images_per_actor=2, wide=True)
    ranks = [Batches(data, 4, 3, 2, 6, images_per_actor=2, wide=True, rank=r, world=world) for r in range(world)]
    for want, *shares in zip(alone, *ranks, strict=True):
        assert len(want) == 8
        assert [len(share) for share in shares] == [8 // world] * world
        assert_same(want, join(shares))


def test_an_epoch_shows_every_actor_once_and_in_time_every_photo(data):
    batches = Batches(data, 4, 0, 0, 60, images_per_actor=2)
    seen = set()
    for step in range(60):
        batch = batches.load(step)
        assert torch.equal(batch.actors[::2], batch.actors[1::2])  # photos of one actor are neighbours
        assert len(set(batch.actors.tolist())) == 4
        if step < 3:
            shapes = batch.shape.reshape(4, 2, 300)
            for actor, (a, b) in zip(batch.actors[::2].tolist(), shapes, strict=True):
                assert torch.equal(a, b) == (PHOTOS[actor % 4] == 1)  # not the same photo twice where there are two
        seen |= {round(float(first), 5) for first in batch.shape[:, 0]}
    assert sorted(torch.cat([batches.load(s).actors[::2] for s in range(3)]).tolist()) == list(range(ACTORS))
    assert len(seen) == len(data)
    assert batches.people == tuple(f"SET/{actor:02d}" for actor in range(ACTORS))
    assert batches.repeating == 3  # actors with one photo only


def test_with_one_photo_of_each_the_order_is_a_plain_shuffle(tmp_path):
    """The order of versions that knew no actors: their runs can be gone on with."""
    samples = [make_sample(index, str(index), True, True) for index in range(10)]
    with write_dataset(tmp_path / "d", samples) as shards:
        batches = Batches(shards, 3, 7, 0, 6)
        for step in range(6):
            epoch, place = divmod(step, 3)
            want = np.random.default_rng([7, epoch]).permutation(10)[place * 3 : place * 3 + 3]
            assert batches.load(step).actors.tolist() == want.tolist()
            np.testing.assert_array_equal(batches.load(step).shape, np.stack([samples[i].shape for i in want]))


def test_what_is_not_known_is_zero_and_marked(samples):
    batch = collate(samples[:7], wide=True)
    assert batch.knows_parameters.tolist() == [index % 2 == 0 for index in range(7)]
    assert batch.knows_landmarks.tolist() == [index % 3 == 0 for index in range(7)]
    for index, sample in enumerate(samples[:7]):
        np.testing.assert_array_equal(batch.shape[index], sample.shape)
        np.testing.assert_array_equal(batch.crop[index], sample.aligned_u8)
        np.testing.assert_array_equal(batch.wide[index], sample.wide_u8)
        want = np.zeros(486) if sample.parameters is None else sample.parameters
        np.testing.assert_array_equal(batch.parameters[index], want)
        points = np.zeros((68, 2))
        if sample.landmarks_px is not None:
            points = (sample.landmarks_px + 0.5) / (WIDE_PX / 2) * (1, -1) + (-1, 1)
        np.testing.assert_allclose(batch.landmarks[index], points, atol=1e-5)
    assert batch.actors.tolist() == [0, 1, 1, 1, 2, 2, 3]
    assert collate(samples[:2], [8, 5]).actors.tolist() == [8, 5]


def test_wide_frames_come_where_asked_for(data):
    assert next(iter(Batches(data, 2, 0, 0, 3))).wide is None
    batch = next(iter(Batches(data, 2, 0, 0, 3, wide=True)))
    assert (batch.wide.shape, batch.wide.dtype) == ((2, WIDE_PX, WIDE_PX, 3), torch.uint8)


def test_batches_move_to_a_device(samples):
    there = collate(samples[:2]).to("meta")
    assert there.wide is None
    assert {getattr(there, f.name).device.type for f in dataclasses.fields(Batch) if f.name != "wide"} == {"meta"}


def test_batches_refuse_what_cannot_be(data, tmp_path):
    for wrong in ({"images_per_actor": 0}, {"threads": 0}, {"rank": 2, "world": 2}, {"rank": -1}, {"world": 0}):
        with pytest.raises(InputError, match=f"{'rank' if 'world' in wrong else next(iter(wrong))}: expected"):
            Batches(data, 4, 0, 0, 1, **wrong)
    with pytest.raises(InputError, match="batch: expected at least 1, got 0"):
        Batches(data, 0, 0, 0, 1)
    with pytest.raises(InputError, match="4 actors cannot be shared evenly by 3 ranks"):
        Batches(data, 4, 0, 0, 1, world=3)
    with pytest.raises(AssetError, match="12 actors, fewer than one batch of 13"):
        Batches(data, 13, 0, 0, 1)
    with pytest.raises(InputError, match="samples: expected at least one"):
        collate([])
    with (
        write_dataset(tmp_path / "d", [make_sample(i, str(i)) for i in range(3)]) as single,
        pytest.raises(AssetError, match="2 photos of each actor are wanted and all have one"),
    ):
        Batches(single, 2, 0, 0, 1, images_per_actor=2)


def test_a_damaged_sample_ends_the_batches_by_name(tmp_path):
    write_dataset(tmp_path / "d", [make_sample(index, str(index), True, True) for index in range(4)]).close()
    _replace(tmp_path / "d" / "00000.tar", "000002.jpg", b"no picture")
    with Shards(tmp_path / "d") as shards, pytest.raises(AssetError, match="sample 2 is damaged"):
        list(Batches(shards, 2, 0, 0, 2))


def test_held_out_is_a_matter_of_name_and_seed():
    names = [f"LYHM/{i:05d}" for i in range(2000)]
    out = {name for name in names if is_held_out(name, 0.1)}
    assert 150 < len(out) < 250
    assert out < {name for name in names if is_held_out(name, 0.2)}  # a larger share keeps those already out
    assert out != {name for name in names if is_held_out(name, 0.1, seed=1)}
    assert not any(is_held_out(name, 0) for name in names)
    # by this version and by every other: nobody held out may slip into a later training set
    assert [i for i, name in enumerate(names[:60]) if name in out] == [0, 1, 9, 17, 25, 26, 50, 51]
    for share in (-0.1, 1.0):
        with pytest.raises(InputError, match="share: expected 0 or above and below 1"):
            is_held_out("x", share)
