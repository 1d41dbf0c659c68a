"""Trains the bundled model: a byte-level BPE tokenizer, then a 14M-parameter Qwen3 decoder, on one GPU.

Run: python train.py --books BOOKS.txt.xz --tasks TASKS.txt.xz --eval tasks.jsonl --work TMP --out DIR --tokens 515e6
Tokenizer and token files in --work are kept and used again, so a short first run prepares a long second one.
"""

import argparse
import json
import lzma
import math
import multiprocessing
import os
import random
import shutil
import time

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from safetensors.torch import save_file

from split import heldout_indices, read_books

VOCAB = 4096
CONTEXT = 1024
PAD, BOS, EOS = 0, 1, 2
SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"]
THINKING = ["<think>", "</think>"]
# Words with a leading space or sign, digits one by one, runs of signs, line ends, other white space (as in Qwen2).
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}"
    "{{- '<|assistant|>' + message['content'] + eos_token }}"
    "{%- elif message['role'] == 'user' %}"
    "{%- if loop.index0 == 1 and messages[0]['role'] == 'system' %}"
    "{{- '<|user|>' + messages[0]['content'] + '\\n\\n' + message['content'] }}"
    "{%- else %}{{- '<|user|>' + message['content'] }}{%- endif %}"
    "{%- elif message['role'] != 'system' or loop.index0 != 0 %}"
    "{{- raise_exception('a message is by user or assistant, or by system and first; got ' + message['role']) }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
SEED = 0


# --- data ---


def train_tokenizer(books, tasks, path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL + THINKING,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = [book[i:i + 20_000] for book in books for i in range(0, min(len(book), 200_000), 20_000)]
    for mark in SPECIAL + THINKING:
        tasks = [task.replace(mark, "\n") for task in tasks]
    tokenizer.train_from_iterator(pieces + tasks, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A <|bos|>:1 $B:1", special_tokens=[("<|bos|>", BOS)]
    )
    spec = json.loads(tokenizer.to_str())
    for token in spec["added_tokens"]:
        # The thinking marks are no special tokens, so that they show when a reply is decoded.
        token["special"] = token["content"] in SPECIAL
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(spec, ensure_ascii=False, indent=2) + "\n")


_worker_tokenizer = None


def _start_worker(path):
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = Tokenizer.from_file(path)


def _encode(texts):
    ids = [id for text in texts for id in _worker_tokenizer.encode(text, add_special_tokens=False).ids]
    return np.array(ids, dtype=np.uint16)


def book_parts(books):
    """Books cut at paragraph ends into parts the workers can share; the marks of start and end at the book's ends."""
    parts = []
    for book in books:
        start, text = 0, f"{SPECIAL[BOS]}{book}{SPECIAL[EOS]}"
        while start < len(text):
            end = text.find("\n\n", start + 100_000)
            end = len(text) if end < 0 else end
            parts.append([text[start:end]])
            start = end
    return parts


def prepare(args):
    """Tokenizer and token streams in --work: books and tasks, each to train on and held out."""
    names = ["books", "heldout-books", "tasks", "heldout-tasks"]
    files = {name: os.path.join(args.work, f"{name}.npy") for name in names}
    tokenizer_path = os.path.join(args.work, "tokenizer.json")
    os.makedirs(args.work, exist_ok=True)
    if not all(map(os.path.exists, files.values())):
        began = time.time()
        books = read_books(args.books)
        heldout = set(heldout_indices(books))
        training = [book for i, book in enumerate(books) if i not in heldout]
        with lzma.open(args.tasks, "rt", encoding="utf-8") as file:
            tasks = file.read().splitlines()
        with open(args.eval, encoding="utf-8") as file:
            heldout_tasks = [document(json.loads(line)) for line in file]
        print(f"read {len(books)} books, {len(tasks)} tasks in {time.time() - began:.0f} s", flush=True)
        if args.tokenizer:
            shutil.copyfile(args.tokenizer, tokenizer_path)
        else:
            train_tokenizer(training, tasks[:20_000], tokenizer_path)
        print(f"tokenizer after {time.time() - began:.0f} s", flush=True)
        groups = {
            "books": book_parts(training),
            "heldout-books": book_parts([books[i] for i in sorted(heldout)]),
            "tasks": [tasks[i:i + 500] for i in range(0, len(tasks), 500)],
            "heldout-tasks": [heldout_tasks],
        }
        with multiprocessing.get_context("fork").Pool(os.cpu_count(), _start_worker, (tokenizer_path,)) as pool:
            for name, parts in groups.items():
                np.save(files[name], np.concatenate(pool.map(_encode, parts, chunksize=4)))
        print(f"tokens after {time.time() - began:.0f} s", flush=True)
    streams = {name: np.load(file) for name, file in files.items()}
    print({name: f"{len(ids) / 1e6:.2f}M" for name, ids in streams.items()}, flush=True)
    tensors = {name: torch.from_numpy(ids.astype(np.int32)).cuda() for name, ids in streams.items()}
    return tokenizer_path, tensors


def prompt(task):
    return f"<|bos|><|user|>{task['question']}<|assistant|>"


def document(task):
    return f"{prompt(task)}<think>{task['steps']}</think>{task['answer']}<|eos|>"


class Batches:
    """Random windows: books anywhere, after a start token; tasks from the start of a document on."""

    def __init__(self, tensors, batch, task_share):
        self.books, self.tasks = tensors["books"], tensors["tasks"]
        self.task_rows = round(batch * task_share)
        self.book_rows = batch - self.task_rows
        starts = (self.tasks == BOS).nonzero()[:, 0]
        self.starts = starts[starts < len(self.tasks) - CONTEXT - 1]
        self.window = torch.arange(CONTEXT + 1, device="cuda")

    def draw(self):
        at = torch.randint(0, len(self.books) - CONTEXT - 1, (self.book_rows,), device="cuda")
        books = self.books[at[:, None] + self.window]
        books[:, 0] = BOS
        at = self.starts[torch.randint(0, len(self.starts), (self.task_rows,), device="cuda")]
        return torch.cat([books, self.tasks[at[:, None] + self.window]]).long()


def heldout_windows(stream, at_start, limit=None):
    """Windows one after another (books), or packed from document starts (tasks), to measure the loss on."""
    count = (len(stream) - 1) // CONTEXT
    windows = torch.stack([stream[i * CONTEXT:(i + 1) * CONTEXT + 1] for i in range(count)]).long()
    if at_start:
        starts = (stream == BOS).nonzero()[:, 0]
        starts = starts[starts < len(stream) - CONTEXT - 1][::5]
        windows = torch.stack([stream[s:s + CONTEXT + 1] for s in starts.tolist()]).long()
    else:
        windows[:, 0] = BOS
    if limit is not None and len(windows) > limit:
        windows = windows[torch.linspace(0, len(windows) - 1, limit).long().to(windows.device)]
    return windows


# --- model ---


def build_model():
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, rope_theta=10000.0, rms_norm_eps=1e-6,
        tie_word_embeddings=True, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    )
    return Qwen3ForCausalLM(config).cuda()


def add_dropout(model, share, batches):
    """Dropout while training on the embeddings and on what each block adds; only in the rows that hold books."""
    in_book = (torch.arange(batches.book_rows + batches.task_rows, device="cuda") < batches.book_rows)[:, None, None]

    def drop(module, _inputs, output):
        return torch.where(in_book, F.dropout(output, share), output) if module.training else output

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(drop)


@torch.no_grad()
def heldout_loss(model, windows, batch=64):
    total = 0.0
    training = model.training
    model.eval()
    for rows in windows.split(batch):
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        total += F.cross_entropy(logits.float().reshape(-1, VOCAB), rows[:, 1:].reshape(-1), reduction="sum").item()
    model.train(training)
    return total / windows[:, 1:].numel()


def train(args, tensors):
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    model = build_model()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f}M parameters", flush=True)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.95), fused=True,
    )

    def loss_of(rows):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().reshape(-1, VOCAB), rows[:, 1:].reshape(-1))

    model.train()
    batches = Batches(tensors, args.batch, args.task_share)
    if args.dropout > 0:
        add_dropout(model, args.dropout, batches)
    compiled = torch.compile(loss_of)
    books = heldout_windows(tensors["heldout-books"], at_start=False, limit=128)
    tasks = heldout_windows(tensors["heldout-tasks"], at_start=True, limit=64)
    history = []
    running, counted = torch.zeros((), device="cuda"), 0
    with torch.autocast("cuda", torch.bfloat16):
        compiled(batches.draw()).backward()  # compile before the clock starts
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    began = time.time()
    step, done = 0, 0.0
    while done < 1 and (args.steps is None or step < args.steps):
        # Warm-up by steps, then a straight line to zero at the last token, or by the clock where that comes first.
        rate = args.lr * min(1, (step + 1) / 300) * max(0.0, 1 - done)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(batches.draw())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running, counted, step = running + loss.detach(), counted + 1, step + 1
        if step % 50 == 0:
            torch.cuda.synchronize()  # keeps the host's clock honest
        done = max(step * args.batch * CONTEXT / args.tokens, (time.time() - began) / (args.minutes * 60))
        if step % args.log_every == 0 or done >= 1 or step == args.steps:
            row = {
                "step": step,
                "tokens": step * args.batch * CONTEXT,
                "train": round((running / counted).item(), 4),
                "heldout_books": round(heldout_loss(model, books), 4),
                "heldout_tasks": round(heldout_loss(model, tasks), 4),
            }
            seconds = time.time() - began
            print(row, f"{seconds:.0f} s, {row['tokens'] / seconds / 1e6:.2f}M tokens/s", flush=True)
            history.append(row)
            running, counted = torch.zeros((), device="cuda"), 0
    return model, history, time.time() - began


# --- results ---


def save(model, tokenizer_path, out):
    """A plain Hugging Face checkpoint whose config both transformers 5 and older loaders read."""
    os.makedirs(out, exist_ok=True)
    weights = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }
    save_file(weights, os.path.join(out, "model.safetensors"), metadata={"format": "pt"})
    config = model.config
    write_json(os.path.join(out, "config.json"), {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BOS,
        "dtype": "bfloat16",
        "eos_token_id": EOS,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "max_window_layers": config.num_hidden_layers,
        "model_type": "qwen3",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pad_token_id": PAD,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB,
    })
    write_json(os.path.join(out, "generation_config.json"), {
        "bos_token_id": BOS, "do_sample": False, "eos_token_id": EOS, "max_new_tokens": 512, "pad_token_id": PAD,
    })
    with open(tokenizer_path, encoding="utf-8") as file:
        spec = json.load(file)
    write_json(os.path.join(out, "tokenizer.json"), spec)
    write_json(os.path.join(out, "tokenizer_config.json"), {
        "add_bos_token": True,
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in spec["added_tokens"]
        },
        "bos_token": "<|bos|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|eos|>",
        "model_max_length": 2048,
        "pad_token": "<|pad|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    })


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@torch.no_grad()
def task_accuracy(model, tokenizer_path, tasks, limit=500):
    """Share of greedy replies that end in the right answer, by kind."""
    tokenizer = Tokenizer.from_file(tokenizer_path)
    tasks = tasks[:limit]
    prompts = [tokenizer.encode(prompt(task), add_special_tokens=False).ids for task in tasks]
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts], device="cuda")
    mask = (torch.arange(longest, device="cuda") >= torch.tensor([[longest - len(p)] for p in prompts], device="cuda"))
    replies = model.generate(
        input_ids=ids, attention_mask=mask.long(), max_new_tokens=320, do_sample=False,
        eos_token_id=EOS, pad_token_id=PAD,
    )[:, longest:].tolist()
    counts = {}
    for task, reply in zip(tasks, replies):
        text = tokenizer.decode([id for id in reply if id != PAD], skip_special_tokens=True)
        answer = text.rsplit("</think>", 1)[1].strip() if "</think>" in text else None
        right, total = counts.get(task["kind"], (0, 0))
        counts[task["kind"]] = (right + (answer == task["answer"]), total + 1)
    for i in range(3):
        print(repr(tokenizer.decode(prompts[i], skip_special_tokens=False)), "->",
              repr(tokenizer.decode(replies[i], skip_special_tokens=False)[:300]), flush=True)
    right, total = (sum(values) for values in zip(*counts.values()))
    return {**{kind: {"right": r, "of": n} for kind, (r, n) in sorted(counts.items())},
            "all": {"right": right, "of": total}}


def draw(history, path):
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "gyre"
    figure, axes = plt.subplots(figsize=(7, 4))
    tokens = [row["tokens"] / 1e6 for row in history]
    for key, label in [("train", "training mix"), ("heldout_books", "held-out books"),
                       ("heldout_tasks", "held-out tasks")]:
        axes.plot(tokens, [row[key] for row in history], label=label)
    axes.set_xlabel("million tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--books", required=True, help="NUL-separated books, xz")
    parser.add_argument("--tasks", required=True, help="training tasks, one document a line, xz")
    parser.add_argument("--eval", required=True, help="held-out tasks, JSON lines")
    parser.add_argument("--work", required=True, help="folder for token files")
    parser.add_argument("--out", required=True, help="folder for the checkpoint")
    parser.add_argument("--tokenizer", help="use this tokenizer.json and train none")
    parser.add_argument("--tokens", type=float, default=515e6, help="tokens to train on")
    parser.add_argument("--minutes", type=float, default=math.inf, help="at most so long, after compilation")
    parser.add_argument("--steps", type=int, help="stop after so many steps, for trials")
    parser.add_argument("--batch", type=int, default=128, help="sequences of 1024 tokens a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--task-share", type=float, default=0.55, help="share of task windows in a step")
    parser.add_argument("--weight-decay", type=float, default=0.3)
    parser.add_argument("--dropout", type=float, default=0.1, help="in book windows, while training")
    parser.add_argument("--log-every", type=int, default=250)
    args = parser.parse_args()

    random.seed(SEED)
    tokenizer_path, tensors = prepare(args)
    model, history, seconds = train(args, tensors)
    save(model, tokenizer_path, args.out)
    print(f"saved after {seconds:.0f} s of training", flush=True)

    # Everything below is measured on the checkpoint as saved, in bf16.
    saved = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16).cuda().eval()
    books_loss = heldout_loss(saved, heldout_windows(tensors["heldout-books"], at_start=False))
    tasks_loss = heldout_loss(saved, heldout_windows(tensors["heldout-tasks"], at_start=True))
    result = {
        "parameters": sum(p.numel() for p in saved.parameters()),
        "seed": SEED,
        "batch": args.batch,
        "context": CONTEXT,
        "learning_rate": args.lr,
        "weight_decay": args.weight_decay,
        "dropout": args.dropout,
        "task_share": args.task_share,
        "training_seconds": round(seconds),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "training_tokens": {name: len(tensors[name]) for name in ("books", "tasks")},
        "final": {
            "tokens": history[-1]["tokens"],
            "heldout_books": round(books_loss, 4),
            "heldout_books_perplexity": round(math.exp(books_loss), 3),
            "heldout_tasks": round(tasks_loss, 4),
        },
        "history": history,
    }
    write_json(os.path.join(args.out, "loss.json"), result)
    print(result["final"], flush=True)
    draw(history, os.path.join(args.out, "loss.svg"))
    with open(args.eval, encoding="utf-8") as file:
        tasks = [json.loads(line) for line in file]
    result["final"]["task_accuracy"] = task_accuracy(saved, tokenizer_path, tasks)
    print(result["final"]["task_accuracy"], flush=True)
    write_json(os.path.join(args.out, "loss.json"), result)


if __name__ == "__main__":
    main()
