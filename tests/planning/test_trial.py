"""A trial takes what the parts of a run take, and leaves everything as it was."""

import itertools
import math
import multiprocessing
import random
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import make_data
import numpy as np
import pytest
import torch
from conftest import SMALL_UNET
from omegaconf import OmegaConf
from slow_parts import SlowImages, SlowModel
from test_training import plain_content

from seg_torch import hardware
from seg_torch.commands.train import train
from seg_torch.configuration import instantiate
from seg_torch.data import SegmentationDataModule
from seg_torch.data.sampling import EpochSampler, ResizedSamples
from seg_torch.datasets import base
from seg_torch.distributed import Processes
from seg_torch.errors import InputError
from seg_torch.planning import trial as module
from seg_torch.planning.part import (
    EndlessSampler,
    KeptSamples,
    Loading,
    SomeBatches,
    seconds_of_sample,
)
from seg_torch.planning.trial import (
    Clock,
    Trial,
    batch_size_that_fits,
    resident_memory,
    trial,
)
from seg_torch.training import build


@pytest.fixture
def slow(small):
    """`slow("key=value", training=..., length=..., decoding=...)`: settings, data, processes."""

    def slow(*overrides, length=40, decoding=0.0, empty_split="", workers=0, cache="none", **model):
        cfg = small("train", *overrides)
        OmegaConf.update(cfg, "model", {"_target_": "slow_parts.SlowModel", **model}, merge=False)
        dataset = partial(SlowImages, length=length, seconds=decoding, empty_split=empty_split)
        data = SegmentationDataModule(dataset, batch_size=2, num_workers=workers, cache=cache)
        SlowModel.batches = 0
        return cfg, data, Processes(cfg.trainer)

    return slow


def state_of_the_process() -> tuple:
    return (
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        random.getstate(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        torch.distributed.is_initialized(),
        multiprocessing.active_children(),
    )


def test_the_seconds_are_those_of_steps_and_images_whatever_the_run_is_limited_to(slow):
    unknown = "lightning.pytorch.callbacks.EarlyStopping"  # fails where it is asked
    cfg, data, processes = slow(
        "trainer.max_steps=1",
        "trainer.limit_train_batches=1",
        "trainer.limit_val_batches=1",
        "trainer.val_check_interval=1",
        "trainer.check_val_every_n_epoch=null",
        f"+callbacks.stop._target_={unknown}",
        "+callbacks.stop.monitor=nothing",
        "+callbacks.stop.check_on_train_epoch_end=true",
        "ema=0.9",
        decoding=0.02,
        training=0.06,
        scoring=0.03,
    )
    settings, attributes, before = cfg.copy(), vars(data).copy(), state_of_the_process()
    found = trial(cfg, data, processes, 1.0)
    # Above: what a busy machine adds; the clock's arithmetic is tested with times that are given.
    assert 0.1 <= found.step_seconds < 0.5
    assert 0.05 <= found.val_seconds < 0.25
    assert 0.05 <= found.test_seconds < 0.25
    assert 0 < found.epoch_seconds < 5
    assert 0 < found.start_seconds < 20
    assert SlowModel.batches >= 4
    assert cfg == settings
    assert vars(data) == attributes
    assert state_of_the_process() == before


def test_workers_that_are_too_slow_are_seen_although_the_first_batches_are_ready(slow):
    cfg, data, processes = slow(
        "trainer.accumulate_grad_batches=3", decoding=0.1, workers=2, training=0.01
    )
    found = trial(cfg, data, processes, 1.0)
    # Two workers prepare two batches of two images in 0.2 s; a step takes three batches.
    assert 0.29 <= found.step_seconds < 1.5
    assert multiprocessing.active_children() == []


def test_a_long_step_is_taken_twice_and_what_is_kept_is_decoded_once(slow):
    cfg, data, processes = slow(
        "trainer.limit_test_batches=0",
        length=80,
        decoding=0.04,
        cache="ram",
        training=0.3,
        empty_split="val",  # of a real split a few images may have no label
    )
    found = trial(cfg, data, processes, 0.2)
    assert SlowModel.batches == 2
    assert 0.3 <= found.step_seconds < 0.38  # nothing of it is decoding: two images take 0.08 s
    assert found.val_seconds < 0.04
    assert found.test_seconds == 0
    decoding = 160 * 0.04 / hardware.available_cpus()  # of train and val, in threads
    assert 0.9 * decoding < found.start_seconds < 3 * decoding + 10


def clocked(monkeypatch, seconds, laps, batches=1, workers=2):
    """A clock after steps of so many seconds, an epoch's end of 3 s, and what is loaded in 4 s."""
    now = [10.0]
    monkeypatch.setattr(module, "resident_memory", lambda: 7)
    part = SimpleNamespace(
        time=lambda: now[0],
        train=Loading(4.0 if workers else 0.0, workers, 2 * workers),
        scored=Loading(0.0, 0, 0),
        images=SimpleNamespace(started=0.0),
        eval_batch_size=2,
        kept=[],
    )
    trainer = SimpleNamespace(
        global_step=0,
        should_stop=False,
        accumulate_grad_batches=batches,
        strategy=SimpleNamespace(broadcast=lambda value: value),
    )
    clock = Clock(part, seconds, torch.device("cpu"))
    clock.on_train_start(trainer, None)
    for lap in laps:
        assert not trainer.should_stop
        for batch in range(batches):
            now[0] += lap / batches
            trainer.global_step += batch == batches - 1
            clock.on_train_batch_end(trainer)
    assert trainer.should_stop
    now[0] += 3
    clock.on_train_end(trainer, None)
    return clock


def test_the_clock_leaves_out_first_steps_and_counts_them_to_the_start(monkeypatch):
    monkeypatch.setattr(hardware, "available_cpus", lambda: 8)
    # The workers prepare four batches ahead: six steps are not those of later.
    clock = clocked(monkeypatch, 24.0, [9.0, *[2.0] * 5, *[1.0] * 14])
    assert clock.step_seconds() == 1.0
    assert clock.start_seconds() == 9 + 5 * 2 - 6
    assert clock.epoch_seconds == 3 + 4  # until the first batch is there
    assert clock.peak_bytes() == 7
    clock = clocked(monkeypatch, 4.0, [9.0, 1.0, 1.0, 1.5, 1.5], batches=3, workers=0)
    assert clock.step_seconds() == pytest.approx(4 / 3)
    assert clock.epoch_seconds == 3
    # Without the time for so many, batches that were ready do not make them look fast.
    clock = clocked(monkeypatch, 4.0, [9.0, 1.0, 1.0, 1.5, 1.5], batches=3)
    assert clock.step_seconds() == 3 * 4.0 / 2
    assert clocked(monkeypatch, 4.0, [9.0, 3.0, 3.0], workers=0).step_seconds() == 3
    # A step that is longer than all of the time is not taken a third time.
    assert clocked(monkeypatch, 4.0, [9.0, 8.0], workers=0).step_seconds() == 8


def test_a_sample_takes_what_a_worker_takes_for_it_once_it_is_in_memory():
    taken = []

    class Samples:
        def __getitem__(self, key):
            time.sleep(0.3 if key not in taken else 0.02)
            taken.append(key)
            assert torch.get_num_threads() == 1

    threads = torch.get_num_threads()
    assert 0.02 <= seconds_of_sample(Samples(), [5, 6, 7, 8]) < 0.2
    assert taken == [5, 6, 7] * 2
    assert torch.get_num_threads() == threads


@pytest.mark.promise(25)
def test_a_run_with_a_trial_is_bit_equal_to_one_without(small, tmp_path, monkeypatch):
    def run(name):
        settings = ("ema=0.9", "data.cache=ram", "data.augment.jitter=0.25", "logger=none")
        train(small("train", *settings, "trainer.max_epochs=1", f"output_dir={tmp_path / name}"))
        return plain_content(tmp_path / name)

    expected = run("without")
    build_network, trials = build.build_network, []

    def after_a_trial(cfg, data, state, processes):
        if not trials:
            trials.append(None)  # which builds a network, too
            trials.append(trial(cfg, data, processes, 0.0))
        return build_network(cfg, data, state, processes)

    monkeypatch.setattr(build, "build_network", after_a_trial)
    found = run("with")
    assert isinstance(trials[1], Trial)
    for key, value in expected.items():
        same = torch.equal(value, found[key]) if torch.is_tensor(value) else value == found[key]
        assert same, key


def test_no_samples_are_stored_for_a_run_that_is_only_tried(compose, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_data.make_folder(tmp_path / "photos")
    photos = f"data.root={tmp_path / 'photos'}"
    settings = ("data.cache=disk", "data.batch_size=2", "trainer.accelerator=cpu")
    cfg = compose("train", "data=folder", photos, *settings, *SMALL_UNET, "model.weights=null")
    data = instantiate(cfg.data)
    assert trial(cfg, data, Processes(cfg.trainer), 0.0).step_seconds > 0
    assert not list(tmp_path.glob("cache/**/samples.bin"))


# Memory


def test_the_memory_of_a_batch_grows_by_what_an_image_takes(slow):
    cfg, data, processes = slow(megabytes=64)
    one, three = (module._measure_steps(cfg, data, processes, n).peak_bytes for n in (1, 3))
    # What the network keeps, and its gradient.
    assert 2 * 64e6 < three - one < 2 * 4 * 67.2e6


def hold(megabytes: int, ready) -> None:  # type: ignore[no-untyped-def]
    content = b"x" * (megabytes << 20)
    ready.set()
    multiprocessing.Event().wait(60 + len(content) % 2)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells that")
def test_the_memory_of_workers_counts_without_what_they_share():
    before = resident_memory()
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=hold, args=(100, ready), daemon=True)
    worker.start()
    assert ready.wait(60)
    try:
        assert 100 << 20 <= resident_memory() - before < 200 << 20
    finally:
        worker.kill()
        worker.join()


def test_samples_that_are_not_decoded_yet_are_part_of_the_memory_and_of_the_start():
    dataset = base.as_dataset(SlowImages("train", 40, 0.05))
    samples = KeptSamples(ResizedSamples(dataset, None, True), 0.0)
    assert 1 <= samples.early < 40
    assert samples.late == 0
    assert samples.early * samples.rate >= 0.05
    assert samples.seconds_of_rest() == pytest.approx(samples.rate * (40 - samples.early))
    assert samples.bytes_of_rest() == (40 - samples.early) * 32 * 32 * 4
    for index in range(40):
        image, mask = samples[index]
        assert image.shape == (3, 32, 32)
        assert mask.shape == (32, 32)
    assert samples.late >= 0.05 * (40 - samples.early)
    assert samples.bytes_of_rest() == 0


def measured(monkeypatch, bytes_of):
    """Steps take `bytes_of(batch_size)`, and are infinitely slow where that is None."""
    tried = []

    def measure(cfg, data, processes, batch_size):
        tried.append(batch_size)
        taken = bytes_of(batch_size)
        return Trial(0, 1.0 if taken else math.inf, 0, 0, 0, taken or 10**10)

    monkeypatch.setattr(module, "_measure_steps", measure)
    return tried


def test_on_a_cpu_a_batch_may_take_half_of_the_memory_and_large_ones_are_not_tried(
    slow, monkeypatch
):
    monkeypatch.setattr(hardware, "total_memory", lambda _: 4 * 10**9)
    tried = measured(monkeypatch, lambda n: 10**9 + n * 2 * 10**8)
    sizes = [8, 1, 2, 4, 5, 6]
    assert batch_size_that_fits(*slow(), sizes) == 5
    assert sorted(tried) == [1, 2]
    measured(monkeypatch, lambda n: 3 * 10**9 + n)
    with pytest.raises(InputError, match=r"batch_size=1.*crop"):
        batch_size_that_fits(*slow(), [2, 4])

    def not_one(n):
        if n == 1:
            raise InputError("this network cannot train on one image")
        return 10**9 + n * 2 * 10**8

    measured(monkeypatch, not_one)
    assert batch_size_that_fits(*slow(), sizes) == 5
    with pytest.raises(InputError, match="cannot train on one"):
        batch_size_that_fits(*slow(), [1])


def test_on_a_gpu_batches_grow_until_one_does_not_fit_or_leaves_no_tenth(monkeypatch):
    gpu = Processes(OmegaConf.create({"accelerator": "cpu", "devices": 1, "num_nodes": 1}))
    gpu.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10**10, 2 * 10**10))
    sizes = [1, 2, 4, 8, 16]
    tried = measured(monkeypatch, lambda n: n * 10**9 if n < 8 else None)
    assert batch_size_that_fits(None, None, gpu, sizes) == 4
    assert tried == [1, 2, 4, 8]
    measured(monkeypatch, lambda n: n * 23 * 10**8)
    assert batch_size_that_fits(None, None, gpu, sizes) == 2  # 4 would take 9.2 of 10 GB

    def not_one(n):
        if n == 1:
            raise InputError("this network cannot train on one image")
        return n * 10**9

    measured(monkeypatch, not_one)
    assert batch_size_that_fits(None, None, gpu, sizes) == 8
    with pytest.raises(InputError, match="cannot train on one"):
        batch_size_that_fits(None, None, gpu, [1])
    measured(monkeypatch, lambda n: None)
    with pytest.raises(InputError, match=r"batch_size=1"):
        batch_size_that_fits(None, None, gpu, sizes)


def test_out_of_memory_on_a_gpu_is_a_result_and_any_other_error_an_error(monkeypatch):
    gpu = Processes(OmegaConf.create({"accelerator": "cpu", "devices": 1, "num_nodes": 1}))
    gpu.device = torch.device("cuda", 0)
    monkeypatch.setattr(hardware, "total_memory", lambda _: 10**10)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda _: None)

    def failing(error):
        def run(*_):
            raise error

        monkeypatch.setattr(module, "_run", run)

    failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert trial(None, None, gpu, 1.0) == Trial(0.0, *[math.inf] * 4, 10**10)
    failing(RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes"):
        trial(None, None, gpu, 1.0)
    gpu.device = torch.device("cpu")
    failing(torch.OutOfMemoryError("out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        trial(None, None, gpu, 1.0)


# Batches


def test_the_endless_epoch_is_one_epoch_after_the_other():
    epochs = EpochSampler(10, 3, seed=5)
    found = [*itertools.islice(iter(EndlessSampler(epochs)), 9)]
    expected = [batch for n in range(3) for batch in EpochSampler(10, 3, seed=5, epoch=n)]
    assert found == expected
    assert [*itertools.islice(iter(EndlessSampler(epochs)), 9)] == expected  # once more


def test_scored_batches_are_spread_over_the_split_and_end_with_the_time():
    batches = [[index] for index in range(100)]
    clock = iter(range(1000))
    some = SomeBatches(batches, 9.5, lambda: float(next(clock)))
    first = [*some]
    assert some.started == 0
    assert len(first) == 2 + 9
    assert min(first)[0] < 20
    assert max(first)[0] > 80
    assert [*SomeBatches(batches, 0.0, lambda: float(next(clock)))] == first[:2]
    assert [*SomeBatches([[]], 0.0, lambda: 0.0)] == [[]]
