#!/usr/bin/env python3
"""A PyTorch model server with random weights, for proofs on real GPUs without a network.

It speaks as vLLM does: OpenAI-compatible completions, and its sleep mode.

    GET  /health, /v1/models
    POST /v1/completions          prompt, max_tokens, temperature, seed, stream
    POST /sleep?level=1           weights go to main memory; level 2: weights are dropped
    POST /wake_up
    GET  /is_sleeping             {"is_sleeping": true}

The model is a decoder of bytes whose weights are drawn from a seed: the same seed and prompt give the same text, before
and after sleep. Text of random weights makes no sense; what counts is that it is computed on the GPU.

Needs Python 3.9 and PyTorch. Exit status 3: PyTorch is missing, or the device is not there.
"""

import argparse
import gc
import json
import os
import signal
import sys
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

try:
    import torch
    from torch import nn
    from torch.nn import functional
except ImportError as error:
    print(f"server.py needs PyTorch: {error}", file=sys.stderr)
    sys.exit(3)

VOCABULARY = 256
CONTEXT = 256
HEADS = 16


class Block(nn.Module):
    """Attention and a perceptron, each with a residual connection."""

    def __init__(self, width):
        super().__init__()
        self.before_attention = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width, bias=False)
        self.joined = nn.Linear(width, width, bias=False)
        self.before_perceptron = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, states):
        batch, length, width = states.shape
        parts = self.attention(self.before_attention(states)).view(batch, length, 3, HEADS, width // HEADS)
        query, key, value = (part.transpose(1, 2) for part in parts.unbind(2))
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        states = states + self.joined(attended.transpose(1, 2).reshape(batch, length, width))
        return states + self.down(functional.gelu(self.up(self.before_perceptron(states))))


class Decoder(nn.Module):
    """A language model over bytes."""

    def __init__(self, width, layers):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens):
        states = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            states = block(states)
        return self.head(self.norm(states[:, -1]))


class Engine:
    """Holds the model on its device, in main memory, or not at all."""

    def __init__(self, device, gib, seed, width):
        self.device = torch.device(device)
        self.type = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.seed, self.width = seed, width
        size = torch.finfo(self.type).bits // 8
        # A block has 12 * width^2 weights, but for a few.
        self.layers = max(1, round(gib * 2**30 / (12 * width * width * size)))
        # Serialises generation, sleep and waking.
        self.lock = threading.Lock()
        self.sleeping = False
        self.model = None
        self.load()

    def load(self):
        """Draws the weights on the device itself, so that loading takes no main memory."""
        torch.manual_seed(self.seed)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.type)
        try:
            with self.device:
                self.model = Decoder(self.width, self.layers).eval()
        finally:
            torch.set_default_dtype(before)
        self.synchronize()

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def release(self):
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def bytes(self):
        """Bytes of the weights; 0 if there are none."""
        return sum(weight.numel() * weight.element_size() for weight in self.model.parameters()) if self.model else 0

    def sleep(self, level):
        with self.lock:
            if self.sleeping:
                return
            if level == 2:
                self.model = None
            else:
                self.model.to("cpu")
            self.sleeping = True
            self.release()

    def wake_up(self):
        with self.lock:
            if not self.sleeping:
                return
            if self.model is None:
                self.load()
            else:
                self.model.to(self.device)
            self.synchronize()
            self.sleeping = False

    def generate(self, prompt, count, temperature, seed):
        """Yields bytes one after the other."""
        with self.lock:
            if self.sleeping:
                raise RuntimeError("the model sleeps")
            tokens = list(prompt.encode())[-CONTEXT:] or [0]
            random = torch.Generator(device=self.device).manual_seed(seed)
            for _ in range(count):
                with torch.inference_mode():
                    scores = self.model(torch.tensor([tokens[-CONTEXT:]], device=self.device))[0].float()
                    if temperature > 0:
                        chances = functional.softmax(scores / temperature, dim=-1)
                        token = torch.multinomial(chances, 1, generator=random).item()
                    else:
                        token = scores.argmax().item()
                tokens.append(token)
                yield token


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    engine = None
    name = ""

    def log_message(self, form, *arguments):
        print(f"{self.address_string()} {form % arguments}", file=sys.stderr, flush=True)

    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status, message):
        self.answer(status, {"error": {"message": message, "type": "invalid_request_error", "code": status}})

    def do_GET(self):
        path = urllib.parse.urlsplit(self.path).path
        if path == "/health":
            self.answer(200, {"device": str(self.engine.device), "weight_bytes": self.engine.bytes()})
        elif path == "/v1/models":
            self.answer(200, {"object": "list", "data": [{"id": self.name, "object": "model"}]})
        elif path == "/is_sleeping":
            self.answer(200, {"is_sleeping": self.engine.sleeping})
        else:
            self.refuse(404, f"path: {path!r}, expected one of those of the OpenAI API")

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urllib.parse.urlsplit(self.path)
        if url.path == "/v1/completions":
            self.complete(body)
        elif url.path == "/sleep":
            level = urllib.parse.parse_qs(url.query).get("level", ["1"])[0]
            if level not in ("1", "2"):
                return self.refuse(400, f"level: {level!r}, expected 1 or 2")
            self.engine.sleep(int(level))
            self.answer(200, {})
        elif url.path == "/wake_up":
            self.engine.wake_up()
            self.answer(200, {})
        else:
            self.refuse(404, f"path: {url.path!r}, expected /v1/completions, /sleep or /wake_up")

    def complete(self, body):
        try:
            request = json.loads(body)
            prompt, count = str(request.get("prompt", "")), int(request.get("max_tokens", 16))
            temperature, seed = float(request.get("temperature", 1.0)), int(request.get("seed", 0))
        except (ValueError, TypeError, AttributeError) as error:
            return self.refuse(400, f"body: {error}, expected a completion request as JSON")
        if not 1 <= count <= 4096:
            return self.refuse(400, f"max_tokens: {count}, expected 1 to 4096")
        if self.engine.sleeping:
            return self.refuse(503, "the model sleeps")
        tokens = self.engine.generate(prompt, count, temperature, seed)
        if request.get("stream"):
            return self.stream(tokens)
        # Bytes as Latin-1: whatever random weights say is valid text.
        text = bytes(tokens).decode("latin-1")
        usage = {"prompt_tokens": len(prompt.encode()), "completion_tokens": count}
        usage["total_tokens"] = sum(usage.values())
        self.answer(200, {**self.head(), "choices": [self.choice(text, "length")], "usage": usage})

    def head(self):
        return {"id": "cmpl-0", "object": "text_completion", "created": int(time.time()), "model": self.name}

    def choice(self, text, reason):
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}

    def stream(self, tokens):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for token in tokens:
            event = {**self.head(), "choices": [self.choice(bytes([token]).decode("latin-1"), None)]}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=int(os.environ.get("PORT", "8080")))
    parser.add_argument("--name", default="random")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--gib", type=float, default=4.0, help="size of the weights")
    parser.add_argument("--width", type=int, default=4096, help="a multiple of 16")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"--device {given.device}: PyTorch {torch.__version__} sees no GPU", file=sys.stderr)
        sys.exit(3)
    if given.gib <= 0 or given.width < HEADS or given.width % HEADS:
        parser.error(f"--gib must be above 0, and --width a multiple of {HEADS}")
    began = time.monotonic()
    engine = Engine(given.device, given.gib, given.seed, given.width)
    Handler.engine, Handler.name = engine, given.name
    server = Server(("127.0.0.1", given.port), Handler)
    took = time.monotonic() - began
    print(f"{engine.bytes()} bytes of weights on {engine.device} in {took:.2f} s; port {given.port}", file=sys.stderr)
    # In another thread: shutdown waits until this one, which serves, has ended.
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever(poll_interval=0.05)


if __name__ == "__main__":
    main()
