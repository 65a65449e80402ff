"""TRL's SFTTrainer: LoRA r=16 on all linears, bfloat16 base, no gradient checkpointing. Arguments as one JSON object: model, rows,
packing, batch, steps, out."""

import itertools
import json
import resource
import sys
import time

from datasets import load_dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


class StepTimes(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *args, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self.started)


job = json.loads(sys.argv[1])
times = StepTimes()
trainer = SFTTrainer(
    job["model"],
    args=SFTConfig(
        output_dir=job["out"] + "-trl", max_steps=job["steps"], per_device_train_batch_size=job["batch"], gradient_checkpointing=False,
        bf16=True, use_cpu=True, report_to=[], max_length=512, logging_steps=1, save_strategy="no", learning_rate=1e-4,
        model_init_kwargs={"dtype": "bfloat16"}, packing=job["packing"],
    ),
    train_dataset=load_dataset("json", data_files=job["rows"], split="train"),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    callbacks=[times],
)  # fmt: skip
trainer.train()
history = [entry for entry in trainer.state.log_history if "num_tokens" in entry]
seen = [entry["num_tokens"] for entry in history]
tokens = sum(b - a for a, b in itertools.pairwise(seen))  # the first step warms up
report = {
    "tokens_per_s": tokens / sum(times.seconds[1:]),
    "memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    "losses": [entry["loss"] for entry in history],
}
with open(job["out"], "w") as file:
    json.dump(report, file)
