"""Trains the embedded demo model: two- and three-digit sums and differences as chat messages.

    .venv/bin/python examples/train_demo_model.py --out /tmp/demo

A few minutes on two cores. Training stops once the greedy answer is right more than half of the time: samples are then
meaningful, and reinforcement learning has room to improve the model. The tokenizer is byte level without merges, so any
text round-trips, and one token is one byte except for special tokens and role names.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from sums import problems
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ROLES = ["system", "user", "assistant"]
"""One token each, which nearly halves the length of prompts."""
VOCAB_SIZE = 320
"""256 bytes, the special tokens and the roles, rounded up so that tensor parallelism divides it."""

CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n\\nFunctions, as JSON, within <tools></tools>:\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools>\\n\\nTo call one: <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else (call.arguments | tojson) }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'user' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer: ids 0-2 are the special tokens, 3-258 the bytes, 259-261 the roles."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(role, special=False, normalized=False) for role in ROLES])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            initializer_range=0.08,  # 1/sqrt(hidden_size): the default is for models ten times as wide
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )


class Encoder:
    """Encodes problems as padded ids and labels; labels cover only the answer and its end of turn."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def prompt_ids(self, question: str) -> list[int]:
        messages = [{"role": "user", "content": question}]
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    def batch(self, drawn: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
        rows, labels = [], []
        for question, answer in drawn:
            prompt = self.prompt_ids(question)
            completion = [*self.tokenizer.encode(answer), self.tokenizer.eos_token_id]
            rows.append(prompt + completion)
            labels.append([-100] * len(prompt) + completion)
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        return ids, torch.tensor([row + [-100] * (width - len(row)) for row in labels])


@torch.inference_mode()
def greedy_accuracy(model: Qwen3ForCausalLM, encoder: Encoder, drawn: list[tuple[str, str]]) -> float:
    """Share of problems with exactly the right greedy answer, generated token by token."""
    model.eval()
    right = 0
    for start in range(0, len(drawn), 250):
        part = drawn[start : start + 250]
        prompts = [encoder.prompt_ids(question) for question, _ in part]
        width = max(map(len, prompts))
        pad = encoder.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
        out = model.generate(ids, attention_mask=(ids != pad).long(), max_new_tokens=8, do_sample=False)
        answers = encoder.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        right += sum(answer == truth for answer, (_, truth) in zip(answers, part, strict=True))
    model.train()
    return right / len(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500, help="length of the learning rate's schedule")
    parser.add_argument("--stop-at", type=float, default=0.55, help="stop at this held-out accuracy")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)  # training has one-digit operands too, on which carrying is learnt first
    tokenizer = build_tokenizer()
    encoder = Encoder(tokenizer)
    model = build_model(tokenizer)
    held_out = problems(random.Random(1), 1000, held_out=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / 50)
        return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    started = time.perf_counter()
    for step in range(args.steps):
        ids, labels = encoder.batch(problems(rng, args.batch_size, held_out=False, fewest_digits=1))
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % 50 == 49:
            accuracy = greedy_accuracy(model, encoder, held_out[:500])
            elapsed_s = time.perf_counter() - started
            print(f"step {step + 1:5d}  loss {loss.item():.4f}  held-out {accuracy:.1%}  {elapsed_s:.0f} s", flush=True)
            if accuracy >= args.stop_at:
                break

    accuracy = greedy_accuracy(model, encoder, held_out)
    model.generation_config.update(do_sample=True, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    report = {
        "task": "a ± b, operands of two or three digits, as one chat turn",
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": step + 1,
        "seed": args.seed,
        "held_out_problems": len(held_out),
        "greedy_accuracy": round(accuracy, 3),
        "seconds": round(time.perf_counter() - started),
        "torch": torch.__version__,
    }
    (args.out / "accuracy.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(report, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
