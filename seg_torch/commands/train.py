"""train.py: trains a model, keeps its best epoch, and scores that on the test set."""

import time
from pathlib import Path

from lightning import seed_everything
from omegaconf import DictConfig

from seg_torch import hardware
from seg_torch.configuration import escaped, instantiate
from seg_torch.data import SegmentationDataModule
from seg_torch.distributed import Processes
from seg_torch.evaluation.scorer import Scorer, score
from seg_torch.models.network import named_compile_errors
from seg_torch.planning import plan
from seg_torch.prediction.inference import Inference, InferenceSettings
from seg_torch.training import build, run
from seg_torch.training.signals import StopOnSignal
from seg_torch.training.trainer import build_trainer


@hardware.restored_flags()
def train(cfg: DictConfig) -> float | None:
    """Train, keep the best epoch, and score it on the test set.

    Returns:
        The mean IoU of the best epoch's validation; `None` if there was no validation.

    Raises:
        InputError: Something is wrong with the settings, the data, the disk or the numbers.
        StoppedError: A signal came, see `seg_torch.training.signals.StopOnSignal`.
    """
    started = time.monotonic()
    cfg = run.requeued_config(cfg)
    build.check_settings(cfg)
    processes = Processes(cfg.trainer)
    folder = Path(processes.same(str(cfg.output_dir)))  # a time in its name differs between them
    cfg.output_dir = escaped(str(folder))
    with processes.claimed(folder), StopOnSignal(folder) as stop, run.disk_errors(folder):
        state = build.read_state(folder) if cfg.resume else None
        processes.first(lambda: run.claim(folder, cfg.trainer, state, cfg.get("init_from")))
        data: SegmentationDataModule = instantiate(cfg.data)
        # The first look at the data downloads them.
        processes.first(lambda: build.check_interval(cfg, data, processes))
        processes.first(data.check_files)
        processes.first_of_each_machine(data.fetch)
        if state is None and plan.is_wanted(cfg):
            data = plan.follow(cfg, data, processes, started)
        processes.first(data.tell_sampling)
        callbacks = [*build.build_callbacks(cfg, folder, processes), stop]
        trainer = build_trainer(cfg, processes, folder, callbacks)
        seed_everything(cfg.seed, workers=True, verbose=False)
        network = build.build_network(cfg, data, state, processes)
        task = build.build_task(cfg, data, network)
        run.begin(cfg, folder, trainer, network, data)
        build.log_settings(cfg, trainer)
        if not run.what_ended(state, cfg.trainer):  # else it was killed in the test
            last = run.last_checkpoint(folder) if state else None
            with hardware.named_nondeterminism(), named_compile_errors():
                trainer.fit(task, datamodule=data, ckpt_path=last, weights_only=True)
            build.log_time_limit(trainer, folder)
        best, epoch = build.load_best(network, folder, processes)
        if cfg.trainer.limit_test_batches != 0:
            settings = InferenceSettings(precision="32-true")  # as evaluate.py has it
            scorer = Scorer(
                Inference(network, len(data.labels), data.resize, settings), data.labels
            )
            trainer = build.scoring_trainer(cfg, trainer, processes, folder)
            score(trainer, scorer, data, folder, "test")
        processes.first(lambda: run.tell_next_steps(folder, best, epoch))
    return best
