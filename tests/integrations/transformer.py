"""Small language models and their data for Hugging Face's Trainer."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback


def bert():
    torch.manual_seed(0)
    sizes = dict(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    return BertForSequenceClassification(BertConfig(**sizes, max_position_embeddings=32))


def gpt2(dropout=0.0):
    torch.manual_seed(0)
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, n_positions=32, **drops))


class Sentences(torch.utils.data.Dataset):
    """Tokens; the label of a sentence is whether it starts with one of the second half (`classes`), else itself."""

    def __init__(self, classes, count=64):
        self.classes, self.count = classes, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        tokens = torch.randint(5, 100, (12,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": tokens, "labels": (tokens[0] > 50).long() if self.classes else tokens}


def trainer(model, folder, kind=Trainer, callbacks=(), sentences=None, optimizers=(None, None), more=None, **options):
    """One of class `kind` that writes to a folder. options: TrainingArguments; more: what `kind` takes beside."""
    usual = dict(max_steps=6, per_device_train_batch_size=8, use_cpu=True, report_to=[], save_strategy="no")
    usual |= dict(logging_steps=1, learning_rate=1e-3, seed=1, disable_tqdm=True)
    data = Sentences(isinstance(model, BertForSequenceClassification))
    made = kind(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **{**usual, **options}),
        train_dataset=data,
        eval_dataset=torch.utils.data.Subset(data, range(16)),
        callbacks=list(callbacks),
        optimizers=optimizers,
        **(more or {}),
    )
    made.remove_callback(PrinterCallback)
    return made


class Gradients(TrainerCallback):
    """`steps`: for each step the gradients that the optimizer itself is given, by name."""

    def __init__(self):
        self.steps = []

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        named = dict(model.named_parameters())
        optimizer.optimizer.register_step_pre_hook(
            lambda *args: self.steps.append({n: p.grad.clone() for n, p in named.items() if p.grad is not None})
        )
