"""TRL's side of `bench.vs_trl`, in a process of its own: GRPOTrainer and PEFT on a run's model, prompts, reward and schedule.

python -m bench.trl_side REPORT CHANGES [options of grpo.py]     # CHANGES: JSON, of TRL's settings; trl must be installed
"""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from bench.reports import Peak, Report, Step, Watch
from engine.model import decode, load_tokenizer
from faults.errors import UserError, command
from harness.config import Config, parse
from harness.scale import filled
from harness.schedule import batch_problems, learning_rate
from harness.setup import fitting
from leetcode_env import LeetCodeEnv, load_problems, render_messages
from loopholes import told_by
from loopholes.evaluator import TRAIN_EVALUATOR

# The linears that engine.lora adapts in a Qwen3.
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Clock(TrainerCallback):
    """Notes the seconds of every step, and what the reward saw of it."""

    def __init__(self) -> None:
        self.watch, self.peak = Watch(), Peak()
        self.seen: list[dict[str, Any]] = []  # of each step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The start of a step: TRL samples inside it."""
        if not self.watch.taken:
            self.peak.reset()
        self.watch.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The end of a step, optimizer included."""
        self.watch.stop()


def settings(cfg: Config, folder: str, changes: dict[str, Any]) -> GRPOConfig:
    """TRL's settings for the work of `cfg`; `changes` are those of one of the options that `bench.vs_trl` tries."""
    sequences = changes.pop("sequences")  # a forward pass; the rest of the batch is accumulated
    chosen: dict[str, Any] = dict(
        output_dir=folder, use_cpu=True, bf16=False, seed=cfg.seed, max_steps=cfg.steps,
        per_device_train_batch_size=sequences, gradient_accumulation_steps=cfg.batch // sequences,
        num_generations=cfg.generations, max_completion_length=cfg.max_new_tokens, shuffle_dataset=False,
        temperature=cfg.temperature, top_k=0, top_p=1.0, beta=cfg.beta, loss_type="dapo", scale_rewards="group",
        optim="adamw_torch", learning_rate=cfg.lr, adam_beta1=cfg.betas[0], adam_beta2=cfg.betas[1],
        weight_decay=cfg.weight_decay, max_grad_norm=cfg.clip, gradient_checkpointing=False,
        save_strategy="no", logging_steps=1, report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    return GRPOConfig(**chosen | changes)


def train(cfg: Config, folder: str, changes: dict[str, Any]) -> Report:
    """Trains for cfg.steps steps; `folder` is TRL's own, and `changes` are as in `settings`."""
    tokenizer = load_tokenizer(str(cfg.model))
    problems = fitting(load_problems(str(cfg.data)), tokenizer, cfg, str(cfg.data), (TRAIN_EVALUATOR,))
    order = [p for step in range(cfg.steps) for p in batch_problems(problems, step, cfg)]
    told = {str(p.id): (p, told_by(p, cfg.loopholes)) for p in order}
    rows = [dict(prompt=render_messages(*told[str(p.id)]), problem=str(p.id)) for p in order]
    clock = Clock()

    with LeetCodeEnv(cfg.workers) as env:
        env.check_setups(problems)

        def reward(completion_ids: list[list[int]], problem: list[str], **_: Any) -> list[float]:
            texts = [decode(tokenizer, ids) for ids in completion_ids]
            grades = env.grade([(told[k][0], text, told[k][1]) for k, text in zip(problem, texts, strict=True)])
            n = len(grades)
            clock.seen.append(dict(
                tokens=sum(map(len, completion_ids)), sequences=n, reward=sum(g.reward for g in grades) / n,
                hack=sum(g.label == "hack" for g in grades) / n, correct=sum(g.correct for g in grades) / n,
            ))  # fmt: skip
            return [g.reward for g in grades]

        args = settings(cfg, folder, dict(changes))
        args.model_init_kwargs = dict(dtype="float32", attn_implementation="sdpa")
        lora = LoraConfig(r=cfg.lora_r, lora_alpha=cfg.lora_alpha, lora_dropout=0.0, target_modules=TARGETS)
        trainer = GRPOTrainer(
            model=str(cfg.model), reward_funcs=reward, args=args, train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer, peft_config=lora, callbacks=[clock],
        )  # fmt: skip
        trainer.create_optimizer()
        trainer.lr_scheduler = LambdaLR(trainer.optimizer, lambda step: learning_rate(step, cfg) / cfg.lr)  # ours, to the digit
        torch.set_num_threads(cfg.threads)
        trainer.train()
    steps = [Step(*took, **seen) for took, seen in zip(clock.watch.taken, clock.seen, strict=True)]
    return Report(steps, clock.peak.read())


@command
def main(argv: list[str] | None = None) -> None:
    """The command line, read by hand: all but the first two words is grpo.py's. Raises UserError where one of them is missing."""
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) < 2 or argv[0].startswith("-"):
        raise UserError("python -m bench.trl_side REPORT CHANGES [options of grpo.py]: REPORT and CHANGES come first")
    path, changes, *options = argv
    cfg = filled(parse(options), "pocket")
    torch.set_num_threads(cfg.threads)
    with tempfile.TemporaryDirectory() as folder:
        train(cfg, folder, json.loads(changes)).write(path)


if __name__ == "__main__":
    sys.exit(main())
