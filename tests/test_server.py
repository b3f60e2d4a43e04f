"""common/server.py: requests become jobs or refusals; jobs are answered in batches; the page."""

import base64
import http.client
import http.server
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from PIL import Image

from common import rollout, server
from common.rollout import Response
from conftest import ROOT
from generate import Generator
from test_generate import call, picture, scripted
from test_rollout import confined

ARGS = dict(
    init="toy", host="127.0.0.1", port=0, files=None, allow_remote=False, seed=None,
    temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.0,
)


@pytest.fixture(scope="module")
def opened(model, processor, tmp_path_factory):
    """opened(**args): a server that answers, with a folder of files beside its other arguments."""
    servers = []
    files = tmp_path_factory.mktemp("files") / "inside"
    files.mkdir()
    picture(90, 70).save(files / "x.png")
    picture(50, 40).save(files.parent / "outside.png")
    (files / "link.png").symlink_to(files.parent / "outside.png")

    def use(**changes):
        args = SimpleNamespace(**ARGS | {"files": str(files)} | changes)
        made = server.open_server(Generator(model, processor), args, max_tokens=12)
        servers.append(made)
        threading.Thread(target=made.serve_forever, daemon=True).start()
        return made

    yield use
    for one in servers:
        one.shutdown()
        one.server_close()


@pytest.fixture(scope="module")
def served(opened):
    return opened()


@pytest.fixture
def files(served):
    return served.reader.files


def png(image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def asks(text="How many circles?", url=None, kind="image_url"):
    shown = [{"type": kind, kind: {"url": url}}] if url else []
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


def send(served, body, path="/v1/chat/completions", method="POST", **headers):
    """-> status, body as JSON or text. body: bytes, or what is sent as JSON."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(*served.server_address, timeout=60)
    connection.request(method, path, data, headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    is_json = answer.getheader("Content-Type") == "application/json"
    return answer.status, json.loads(text) if is_json else text


def said(served, **request):
    """The text of a good request's answer."""
    status, answer = send(served, {"messages": asks(), "seed": 1} | request)
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"]


def chunks_of(text: str) -> list[dict]:
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


# --------------------------------------------------------------------------------------------------
# the protocol


def test_the_official_client_asks_about_a_picture(served, processor):
    openai = pytest.importorskip("openai")
    url = f"{served.url}/v1"
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    [model] = client.models.list().data
    assert model.id == "toy" and client.models.retrieve("toy").id == "toy"

    image = picture(90, 70)
    messages = [{"role": "system", "content": "Be brief."}, *asks(url=png(image))]
    ask = dict(model="toy", messages=messages, seed=3, temperature=0.9, max_tokens=8)
    whole = client.chat.completions.create(**ask)
    [choice] = whole.choices

    # what the generator itself says to the same conversation
    shown = [{"type": "image", "image": image}, {"type": "text", "text": "How many circles?"}]
    conversation = {"messages": [messages[0], {"role": "user", "content": shown}]}
    sample = processor(conversation, generate=True)
    generator = served.worker.generator
    [response] = generator.sample([sample], 8, temperature=0.9, seed=["3/0"])
    assert choice.message.content == processor.tokenizer.decode(response.ids, skip_special=True)
    assert (choice.finish_reason, choice.message.role) == ("length", "assistant")
    assert whole.usage.prompt_tokens == len(sample["tokens"]) and whole.usage.completion_tokens == 8
    assert whole.usage.total_tokens == len(sample["tokens"]) + 8

    options = {"include_usage": True}
    *chunks, last = client.chat.completions.create(**ask, stream=True, stream_options=options)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == choice.message.content and last.usage == whole.usage and last.choices == []
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "length"]

    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="toy", messages=[])
    assert error.value.param == "messages"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=messages)


def test_a_stream_is_the_answer_in_pieces(served):
    ask = {"messages": asks(), "seed": 5, "n": 2}
    status, text = send(served, ask | {"stream": True})
    chunks = chunks_of(text)
    texts = ["", ""]
    for chunk in chunks:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert status == 200 and {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1 and "usage" not in chunks[0]
    _, whole = send(served, ask)
    assert [choice["message"]["content"] for choice in whole["choices"]] == texts
    assert texts[0] != texts[1] and whole["usage"]["completion_tokens"] == 24  # two of 12 each


@pytest.mark.parametrize(
    "change, param, code",
    [
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"messages": []}, "messages", "invalid_type"),
        ({"messages": "Hi"}, "messages", "invalid_type"),
        ({"messages": ["Hi"]}, "messages[0]", "invalid_type"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": ["user"], "content": ""}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "invalid_type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages[0].content[0]", "invalid_value",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]},
            "messages[0].tool_calls", "unsupported_parameter",
        ),
        ({"messages": asks() + [{"role": "assistant", "content": "a"}]}, "messages",
         "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"temperature": True}, "temperature", "invalid_type"),
        ({"temperature": 2.5}, "temperature", "invalid_value"),
        ({"temperature": float("nan")}, "temperature", "invalid_value"),
        ({"top_p": -1}, "top_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 1.5}, "n", "invalid_type"),
        ({"max_tokens": -3}, "max_tokens", "invalid_value"),
        ({"max_tokens": 10**8}, "messages", "context_length_exceeded"),
        ({"messages": asks("word " * 10_000)}, "messages", "context_length_exceeded"),
        ({"messages": asks("a" * 2_000_000)}, "messages", "context_length_exceeded"),
        ({"seed": "a"}, "seed", "invalid_type"),
        ({"stop": 3}, "stop", "invalid_type"),
        ({"stop": ["a", ""]}, "stop", "invalid_type"),
        ({"stop": list("abcde")}, "stop", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"stream_options": {"foo": 1}}, "stream_options.foo", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"logprobs": True}, "logprobs", "unsupported_parameter"),
        ({"foo": 1}, "foo", "unknown_parameter"),
        ({"messages": asks(url="data:image/png;base64,@@@")}, "messages", "invalid_base64_image"),
        ({"messages": asks(url="data:image/png,abc")}, "messages", "invalid_image_format"),
        ({"messages": asks(url="data:image/png;base64,QUJD")}, "messages", "invalid_image_format"),
        (
            {"messages": asks(url=png(Image.new("1", (20_000, 20_000))))},
            "messages", "image_too_large",
        ),
        (
            {"messages": asks(url="data:video/mp4;base64,QUJD", kind="video_url")},
            "messages", "invalid_image",
        ),
        ({"messages": asks(url="file:///etc/passwd")}, "messages", "invalid_image_url"),
        ({"messages": asks(url="ftp://a/b.png")}, "messages[0].content[0].image_url.url",
         "invalid_image_url"),
        ({"messages": asks(url="http://[a/b.png")}, "messages[0].content[0].image_url.url",
         "invalid_image_url"),
        ({"messages": asks(url="x.png")}, "messages[0].content[0].image_url.url",
         "invalid_image_url"),
        ({"messages": asks(url="file://" + "/" * 20_000)},
         "messages[0].content[0].image_url.url", "invalid_image_url"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_the_protocols_form(served, change, param, code):
    status, answer = send(served, {"messages": asks()} | change)
    error = answer["error"]
    assert (status, error["param"], error["code"]) == (400, param, code)
    assert error["type"] == "invalid_request_error" and 0 < len(error["message"]) < 400
    assert set(error) == {"message", "type", "param", "code"}


def test_the_server_goes_on_behind_bad_requests(served, monkeypatch):
    monkeypatch.setattr(server, "BODY", 10_000)
    assert send(served, b"{")[0] == send(served, b"[]")[0] == send(served, b"\xff")[0] == 400
    assert send(served, b"[" * 9_000)[0] == 400
    status, answer = send(served, b" " * 100_000)
    assert (status, answer["error"]["code"]) == (413, "request_too_large")
    assert send(served, {}, "/v1/embeddings")[1]["error"]["code"] == "unknown_url"
    assert send(served, None, "/v1/chat/completions", "GET")[0] == 405
    status, answer = send(served, {}, method="PUT")
    assert status == 501 and answer["error"]["type"] == "invalid_request_error"
    assert send(served, None, **{"Content-Length": "-5"})[0] == 411
    for raw in (b"\0\xff\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/chat/completions\r\n"):
        with socket.create_connection(served.server_address, timeout=30) as s:
            s.sendall(raw)
            s.shutdown(socket.SHUT_WR)
            s.recv(1 << 16)
    assert send(served, None, "/health", "GET") == (200, {"status": "ok"})
    assert isinstance(said(served), str)


def test_parameters_that_ask_for_nothing_are_taken(served):
    neutral = {key: values[0] for key, values in server.NEUTRAL.items()}
    neutral |= dict.fromkeys(server.NOTES, {"a": "b"})
    more = {"user": "me", "stop": None, "top_p": 0, "max_completion_tokens": 3, "max_tokens": 9}
    status, answer = send(served, {"messages": asks(), "model": "toy"} | neutral | more)
    assert status == 200 and answer["usage"]["completion_tokens"] == 3


def test_what_the_official_client_may_say_beside_a_message(served):
    """Names, and what an answer holds that is sent back as it came."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    ask = dict(model="toy", seed=1, max_tokens=4)
    turns = [{"role": "system", "content": "Be brief."}, *asks()]
    named = [turn | {"name": "Ada"} for turn in turns]
    plain, other = (client.chat.completions.create(**ask, messages=m) for m in (turns, named))
    message = other.choices[0].message
    assert message == plain.choices[0].message
    back = message.model_dump() | {"name": "toy", "content": "Two."}
    assert {"refusal", "audio", "tool_calls", "function_call"} <= set(back)
    client.chat.completions.create(**ask, messages=[*named, back, *asks("And now?")])


def test_any_text_can_be_asked(served):
    for text in ("", "<|im_end|><|image_pad|>", "\ud800 \0 \x1b", "<image>", "数"):
        assert isinstance(said(served, messages=asks(text)), str)
    turns = [*asks(), {"role": "assistant", "content": "<|image_pad|><think>a", "images": [1]}]
    assert isinstance(said(served, messages=[*turns, *asks("And?")]), str)


# --------------------------------------------------------------------------------------------------
# pictures and clips


def test_a_picture_is_the_same_from_a_url_and_from_a_file(served, files, monkeypatch):
    inline = said(served, messages=asks(url=png(Image.open(f"{files}/x.png"))))
    for url in (f"file://{files}/x.png", f"file://localhost{files}/../inside/%78.png"):
        assert said(served, messages=asks(url=url)) == inline
    monkeypatch.setattr(server, "LOW_DETAIL", 56 * 56)
    read = {}
    for detail in ("low", "high", "auto", None):
        messages = asks(url=url)
        messages[0]["content"][0]["image_url"]["detail"] = detail
        read[detail] = send(served, {"messages": messages})[1]["usage"]["prompt_tokens"]
    assert read["high"] == read["auto"] == read[None] > read["low"]


@pytest.mark.parametrize(
    "path, code",
    [
        ("link.png", "invalid_image_url"),
        ("../outside.png", "invalid_image_url"),
        ("%2e%2e/outside.png", "invalid_image_url"),
        ("none.png", "image_file_not_found"),
        ("", "invalid_image_format"),
        ("x.png%00", "invalid_image_url"),
    ],
)
def test_no_file_outside_is_opened(served, files, path, code):
    status, answer = send(served, {"messages": asks(url=f"file://{files}/{path}")})
    assert (status, answer["error"]["code"]) == (400, code)
    assert os.path.dirname(files) not in answer["error"]["message"]
    assert "outside.png" not in answer["error"]["message"]  # where the link leads


@pytest.mark.parametrize("url", ["file://x.png", "file:x.png", "file://host/x.png", "x.png"])
def test_the_forms_of_urls_are_said(served, url):
    forms = "data:image/png;base64,.., file:///WHOLE/PATH"
    status, answer = send(served, {"messages": asks(url=url)})
    assert (status, answer["error"]["code"]) == (400, "invalid_image_url")
    assert answer["error"]["message"].endswith(f"URLs that are read here are {forms}")


def test_without_a_folder_no_file_is_named(opened, files):
    closed = opened(files=None)
    status, answer = send(closed, {"messages": asks(url=f"file://{files}/x.png")})
    assert (status, answer["error"]["code"]) == (400, "invalid_image_url")


def test_a_clip(served, files):
    frames = [picture(64, 56, seed) for seed in range(6)]
    frames[0].save(f"{files}/x.webp", save_all=True, append_images=frames[1:], duration=500)
    url = f"file://{files}/x.webp"
    clip = [{"type": "video_url", "video_url": {"url": url, "fps": 2}}]
    ask = {"messages": [{"role": "user", "content": clip}]}
    status, answer = send(served, ask)
    assert status == 200
    clip[0]["video_url"]["fps"] = 1
    assert send(served, ask)[1]["usage"]["prompt_tokens"] < answer["usage"]["prompt_tokens"]
    clip[0]["video_url"]["fps"] = None  # as if it were not there
    unset = send(served, ask)
    del clip[0]["video_url"]["fps"]
    assert unset[0] == 200 and unset[1]["usage"] == send(served, ask)[1]["usage"]
    with open(f"{files}/x.webp", "rb") as file:
        data = base64.b64encode(file.read()).decode()
    clip[0]["video_url"] = {"url": f"data:video/webp;base64,{data}", "fps": 2}
    assert send(served, ask)[1]["usage"] == answer["usage"]


@pytest.fixture
def web(files):
    """A site with x.png, more than may be read, and a way to a file."""

    class Site(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/away":
                self.send_response(302)
                self.send_header("Location", f"file://{files}/x.png")
                return self.end_headers()
            self.send_response(200 if self.path in ("/x.png", "/long") else 404)
            self.end_headers()
            with open(f"{files}/x.png", "rb") as file:
                self.wfile.write(file.read() if self.path == "/x.png" else b"a" * 200_000)

        def log_message(self, *_):
            pass

    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{site.server_address[1]}"
    site.shutdown()
    site.server_close()


def test_the_web_is_read_only_where_that_is_switched_on(served, opened, web, files, monkeypatch):
    _, answer = send(served, {"messages": asks(url=f"{web}/x.png")})
    assert answer["error"]["code"] == "invalid_image_url"
    remote = opened(allow_remote=True)
    inline = said(served, messages=asks(url=f"file://{files}/x.png"))
    assert said(remote, messages=asks(url=f"{web}/x.png")) == inline
    monkeypatch.setattr(server, "BODY", 100_000)
    for path in ("none", "away", "long"):
        status, answer = send(remote, {"messages": asks(url=f"{web}/{path}")})
        assert (status, answer["error"]["code"]) == (400, "failed_to_download_image")


def test_what_one_request_fetches_is_counted_together(opened, web, files, monkeypatch):
    remote = opened(allow_remote=True)
    size = os.path.getsize(f"{files}/x.png")
    costs = []
    for count in (1, 2):
        turns = [*asks(url=f"{web}/x.png"), {"role": "assistant", "content": "a"}] * count
        costs.append(remote.reader.job({"messages": turns[:-1]}, 0))
    one, two = costs
    assert [job.cost - job.sample["patches"].nbytes for job in costs] == [size, 2 * size]
    monkeypatch.setattr(server, "BODY", 2 * size - 1)
    assert remote.reader.job({"messages": asks(url=f"{web}/x.png")}, 0).cost == one.cost
    status, answer = send(remote, {"messages": turns[:-1]})
    assert (status, answer["error"]["code"]) == (400, "failed_to_download_image")
    assert f"more than {2 * size - 1} bytes in one request" in answer["error"]["message"]


# --------------------------------------------------------------------------------------------------
# batches


@pytest.fixture
def batches(served, monkeypatch):
    """The sizes of the batches that are decoded."""
    sizes = []
    decode = served.worker.decode

    def watched(jobs):
        sizes.append(len(jobs))
        decode(jobs)

    monkeypatch.setattr(served.worker, "decode", watched)
    return sizes


def test_fifty_at_once_are_answered_in_batches(served, batches):
    alone = [said(served, seed=seed) for seed in (0, 1, 49)]
    batches.clear()
    with ThreadPoolExecutor(50) as pool:
        texts = list(pool.map(lambda seed: said(served, seed=seed), range(50)))
    assert [texts[0], texts[1], texts[49]] == alone  # nobody depends on the others
    assert sum(batches) == 50 and len(batches) < 25


def test_one_batch_is_sampled_in_one_way(served, batches):
    """Jobs that wait: those that are sampled as the oldest one go first, together."""
    read = served.worker.read
    jobs = []
    with served.worker.changed:  # as long as it is held, none is taken
        for temperature in (0.5, 1.0, 0.5):
            request = {"messages": asks(), "temperature": temperature}
            jobs.append(served.reader.job(request, 0))
        served.worker.waiting.extend(jobs)
    read(served.reader, {"messages": asks(), "temperature": 0.5}, 0)
    for job in jobs:
        while not isinstance(job.events.get(timeout=60)[1], server.Ended):
            pass
    assert batches in ([2, 1, 1], [3, 1], [1, 2, 1], [2, 2])


def test_who_has_gone_costs_no_more_tokens(served, monkeypatch):
    scripted(monkeypatch, lambda prompt: "a b " * 500)
    ended = []
    end = server.Answer.end

    def watched(answer, response):
        ended.append(len(response.ids))
        end(answer, response)

    monkeypatch.setattr(server.Answer, "end", watched)
    body = json.dumps({"messages": asks(), "max_tokens": 2000, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(served.server_address, timeout=60) as s:
        s.sendall(head + body)
        assert s.recv(1 << 10)
        # closed by a reset, so that the very next piece fails
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert said(served, max_tokens=4).startswith("a b")  # it waits for the row of who has gone
    assert ended[0] < 1000 and ended[1] == 4


def test_a_request_that_breaks_the_model_harms_no_other(served, monkeypatch, batches):
    sample = Generator.sample
    bad = 13

    def fragile(self, samples, limits, **how):
        if bad in limits:
            raise RuntimeError("out of memory")
        return sample(self, samples, limits, **how)

    monkeypatch.setattr(Generator, "sample", fragile)
    with ThreadPoolExecutor(6) as pool:
        asked = [{"messages": asks(), "max_tokens": n, "seed": 1} for n in (5, bad, 5, 5, bad, 5)]
        answers = list(pool.map(lambda body: send(served, body), asked))
    assert [status for status, _ in answers] == [200, 500, 200, 200, 500, 200]
    assert answers[1][1]["error"]["type"] == "server_error"
    assert "out of memory" not in json.dumps(answers[1][1])


def test_an_answer_that_has_ended_does_not_come_twice(served, monkeypatch):
    """Not even one without text, of a batch that fails behind it."""
    batches = []

    def fragile(jobs):
        batches.append(jobs)
        server.Answer(jobs[0], 0).end(Response(finished=True))
        if len(jobs) > 1:
            raise RuntimeError

    monkeypatch.setattr(served.worker, "decode", fragile)
    two, one = (served.reader.job({"messages": asks(), "n": n}, 0) for n in (2, 1))
    served.worker.answer([two, one])
    assert batches == [[two, one], [one]]
    (number, ended), failed = two.events.get_nowait(), two.events.get_nowait()
    assert number == 0 and ended.reason == "stop" and failed.status == 500
    assert two.events.empty() and one.events.get_nowait() == (0, ended)


def test_too_much_that_waits_is_refused(served, monkeypatch):
    monkeypatch.setattr(server, "HELD", 10)
    waits = SimpleNamespace(cost=5, sampling=())
    changed = threading.Condition()
    worker = SimpleNamespace(changed=changed, waiting=[waits], reading=0, held=lambda: 5)
    with pytest.raises(server.Refused) as refused:
        server.Worker.read(worker, served.reader, {"messages": asks()}, 100)
    assert refused.value.status == 429 and worker.reading == 0 and worker.waiting == [waits]


def test_bodies_that_arrive_are_counted_too(served, monkeypatch):
    body = json.dumps({"messages": asks("a" * 300)}).encode()
    monkeypatch.setattr(server, "HELD", len(body) + 10)
    served.worker.hold(11)
    try:
        status, answer = send(served, body)
        assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
    finally:
        served.worker.hold(-11)
    assert send(served, body)[0] == 200 and served.worker.arriving == 0
    assert send(served, b"x" * 100)[0] == 400 and served.worker.arriving == 0


# --------------------------------------------------------------------------------------------------
# clients that are slow, many, or send too much


def drip(served, head: bytes) -> bytes:
    """Sends head, then a byte from time to time; returns what comes back until the server ends."""
    said = b""
    with socket.create_connection(served.server_address, timeout=60) as s:
        s.sendall(head)
        s.settimeout(0.05)
        while True:
            try:
                s.sendall(b"a")
                piece = s.recv(1 << 16)
                said += piece
                if not piece:
                    return said
            except TimeoutError:
                continue
            except ConnectionError:
                return said


def test_a_request_that_drips_in_is_given_up(served, monkeypatch):
    monkeypatch.setattr(server, "RECEIVING", 0.5)
    said = drip(served, b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: 99999\r\n\r\n{")
    head, _, body = said.partition(b"\r\n\r\n")
    assert b" 408 " in head and "of 99999 bytes" in json.loads(body)["error"]["message"]
    assert drip(served, b"GET /health HTTP/1.0\r\nX: ") == b""  # no request to answer
    assert served.worker.arriving == 0
    monkeypatch.undo()
    assert send(served, None, "/health", "GET")[0] == 200


def test_more_connections_than_there_are_places(opened, monkeypatch):
    monkeypatch.setattr(server, "CONNECTIONS", 2)
    small = opened()
    idle = [socket.create_connection(small.server_address, timeout=60) for _ in range(2)]
    with socket.create_connection(small.server_address, timeout=60) as s:
        said = b"".join(iter(lambda: s.recv(1 << 16), b""))
    head, _, body = said.partition(b"\r\n\r\n")
    assert b" 503 " in head and json.loads(body)["error"]["type"] == "server_error"
    for s in idle:
        s.close()
    for _ in range(2):  # both places are free again
        assert small.places.acquire(timeout=60)
    small.places.release(2)
    assert send(small, None, "/health", "GET")[0] == 200


def test_no_error_echoes_megabytes(served):
    long = "x" * 3_000_000
    turn = {"role": "user", "content": "", long: 1}
    for request in ({long: 1}, {"model": long}, {"messages": [turn]}):
        status, answer = send(served, {"messages": asks()} | request)
        assert status in (400, 404) and len(json.dumps(answer)) < 1000
    status, answer = send(served, {"messages": asks(), "n": 10**4000})
    assert status == 400 and len(json.dumps(answer)) < 1000


def test_more_messages_than_tokens(served):
    part = {"type": "text", "text": ""}
    for messages in (asks("a") * 200_000, [{"role": "user", "content": [part] * 200_000}]):
        status, answer = send(served, {"messages": messages})
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


def test_text_in_other_encodings(served):
    """UTF-16 and -32 are JSON's too; what is none of them is refused."""
    body = json.dumps({"messages": asks("数"), "seed": 1}, ensure_ascii=False)
    said = [send(served, body.encode(code))[1] for code in ("utf-8", "utf-16", "utf-32")]
    assert said[0]["choices"] == said[1]["choices"] == said[2]["choices"]
    for raw in (body.encode("gbk"), body.encode()[:-9], b'{"messages": "\xc3("}'):
        status, answer = send(served, raw)
        assert (status, answer["error"]["code"]) == (400, "invalid_json")


def test_a_clip_that_hours_would_be_decoded(served, files, monkeypatch):
    frames = [picture(64, 56, seed) for seed in range(6)]
    frames[0].save(f"{files}/y.webp", save_all=True, append_images=frames[1:], duration=500)
    with open(f"{files}/y.webp", "rb") as file:
        url = "DATA:video/webp;base64," + base64.b64encode(file.read()).decode()
    monkeypatch.setattr(server, "CLIPS", 6 * 64 * 56)
    ask = {"messages": asks(url=url, kind="video_url")}
    assert send(served, ask)[0] == 200
    monkeypatch.setattr(server, "CLIPS", 6 * 64 * 56 - 1)
    status, answer = send(served, ask)
    assert (status, answer["error"]["code"]) == (400, "image_too_large")
    ask = {"messages": asks(url=f"file://{files}/y.webp", kind="video_url")}
    assert send(served, ask)[0] == 200


def test_a_request_waits_for_a_reader_only_so_long(served, monkeypatch):
    monkeypatch.setattr(server, "DECODING", 0.1)
    monkeypatch.setattr(served.reader, "decoding", threading.Semaphore(0))
    status, answer = send(served, {"messages": asks()})
    assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")


def test_sites_that_drip_or_never_end(opened, files, monkeypatch):
    """Each byte is in time. All URLs of a request share its time."""
    over = threading.Event()
    asked = []

    class Site(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path != "/head":
                self.send_response(200)
                self.end_headers()
            while not over.wait(0.05):
                self.wfile.write(b"a")

        def log_message(self, *_):
            pass

    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    site.block_on_close = False
    threading.Thread(target=site.serve_forever, daemon=True).start()
    remote = opened(allow_remote=True)
    monkeypatch.setattr(server, "FETCHING", 0.5)
    for path in ("head", "body"):
        url = f"http://127.0.0.1:{site.server_address[1]}/{path}"
        status, answer = send(remote, {"messages": asks(url=url)})
        assert (status, answer["error"]["code"]) == (400, "failed_to_download_image")
        assert "was not read within the 0.5 seconds" in answer["error"]["message"]
    web = server.Web()
    for _ in range(2):
        with pytest.raises(server.Refused):
            web.fetched(url, "here")
    assert asked[:3] == ["/head", "/body", "/body"] and web.bytes < 100
    over.set()
    site.shutdown()
    site.server_close()


# --------------------------------------------------------------------------------------------------
# what is written


@pytest.mark.parametrize(
    "stop, text, reason",
    [
        ("blue", "red, ", "stop"),
        (["green", "ed, b"], "r", "stop"),
        (["blues", "x"], "red, blue", "stop"),  # begun at the end, not whole
        (["red"], "", "stop"),
        (None, "red, blue", "stop"),
    ],
)
def test_stop_strings_end_an_answer_and_are_no_part_of_it(served, monkeypatch, stop, text, reason):
    scripted(monkeypatch, lambda prompt: "red, blue")
    ask = {"messages": asks(), "stop": stop, "max_tokens": 50}
    _, whole = send(served, ask)
    [choice] = whole["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, reason)
    chunks = chunks_of(send(served, ask | {"stream": True})[1])
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == text


def test_tools_run_and_what_they_show_is_sent(served, files, monkeypatch):
    code = call("crop(0, 0, 500, 500)\nprint(6 * 7)")
    scripted(monkeypatch, lambda prompt: f"<think>{code}so</think>red")
    ask = {"messages": asks(url=f"file://{files}/x.png"), "max_tokens": 200, "stop": ["zzz"]}
    status, whole = send(served, ask)
    message = whole["choices"][0]["message"]
    shown = "<sandbox_output>42</sandbox_output>"
    assert message["content"] == f"<think>{code}{shown}so</think>red"
    [image] = message["images"]
    data = base64.b64decode(image["image_url"]["url"].partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (45, 35)
    chunks = chunks_of(send(served, ask | {"stream": True})[1])
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"]
    assert [delta["images"] for delta in deltas if "images" in delta] == [[image]]
    # more calls than are answered: a limit has ended it
    scripted(monkeypatch, lambda prompt: call("1 + 1") * 9)
    assert send(served, ask)[1]["choices"][0]["finish_reason"] == "length"


@confined
def test_python_runs_where_that_was_chosen(served, files, monkeypatch):
    monkeypatch.setattr(rollout, "_level", "python")
    code = "<code>\n```python\nshow(image.rotate(90, expand=True))\n```\n</code>"
    scripted(monkeypatch, lambda prompt: f"{code} red")
    ask = {"messages": asks(url=f"file://{files}/x.png"), "max_tokens": 200}
    message = send(served, ask)[1]["choices"][0]["message"]
    assert message["content"] == f"{code}<sandbox_output></sandbox_output> red"
    assert len(message["images"]) == 1


# --------------------------------------------------------------------------------------------------
# the page, and the command line


def test_the_page_needs_nothing_else(served):
    status, page = send(served, None, "/", "GET")
    assert status == 200 and page == server.PAGE.read_text(encoding="utf-8")
    assert not re.search(r"https?://|src=\"(?!data:)|<link (?!rel=\"icon\" href=\"data:)", page)


def test_a_fault_of_the_servers_files_is_said(served, monkeypatch, tmp_path):
    monkeypatch.setattr(server, "PAGE", tmp_path / "none.html")
    status, answer = send(served, None, "/", "GET")
    assert (status, answer["error"]["type"]) == (500, "server_error")


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Host": "127.0.0.1:1", "Origin": "http://127.0.0.1:1"}, 200),
        ({"Host": "evil.org"}, 403),  # its name leads here
        ({"Host": "127.0.0.1:1", "Origin": "http://evil.org"}, 403),
        ({"Host": "127.0.0.1:1", "Origin": "null"}, 403),
        ({"Host": "["}, 403),
    ],
)
def test_other_sites_cannot_use_it(served, headers, status):
    assert send(served, None, "/v1/models", "GET", **headers)[0] == status


def test_the_end_waits_for_threads_that_answer(opened, monkeypatch):
    """One that frees tensors while the program ends would abort it."""
    freed = threading.Event()
    get = server.Handler.get

    def slow(handler):
        get(handler)
        time.sleep(0.3)  # its client has the whole answer
        freed.set()

    monkeypatch.setattr(server.Handler, "get", slow)
    one = opened()
    assert send(one, None, "/health", "GET")[0] == 200
    one.shutdown()
    one.close()
    assert freed.is_set()


def test_the_end_waits_but_a_moment_for_clients_that_say_nothing(opened, monkeypatch):
    monkeypatch.setattr(server, "ENDING", 0.1)
    one = opened()
    with socket.create_connection(one.server_address, timeout=60) as idle:
        assert send(one, None, "/health", "GET")[0] == 200
        one.shutdown()
        one.close()
        idle.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert b"200 OK" in idle.recv(100)  # its thread was there all the time


@pytest.mark.parametrize("ends", [signal.SIGINT, signal.SIGTERM])
def test_the_command_line(model, processor, tmp_path, ends):
    """A shell starts what is in the background with ctrl-C ignored: the server hears it even so."""
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    command = [sys.executable, "generate.py", "--init", str(tmp_path / "m"), "--device", "cpu"]
    command += ["--serve", "--port", "0", "--max-new-tokens", "3"]
    background = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    run = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=background
    )
    try:
        lines = iter(run.stderr.readline, "")
        url = next(re.search(r"http://(127\.0\.0\.1):(\d+)", line) for line in lines if "API" in line)
        address = SimpleNamespace(server_address=(url[1], int(url[2])))
        answer = send(address, {"messages": asks()})[1]
        assert answer["usage"]["completion_tokens"] == 3
        assert answer["model"] == str(tmp_path / "m")
    finally:
        run.send_signal(ends)
        assert run.wait(300) == 0
        run.stderr.close()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"temperature": -1}, "--temperature"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty must be"),
        ({"max_tokens": -5}, "--max-new-tokens must be"),
        ({"max_tokens": 0}, "--max-new-tokens must be"),
        ({"seed": 2**63}, "--seed must be"),
        ({"files": "nowhere"}, "--files nowhere"),
        ({"port": 99999}, "--port 99999"),
        ({"host": "no.such.host.invalid"}, "--host"),
    ],
)
def test_wrong_arguments_end_it_at_once(model, processor, changes, message):
    args = SimpleNamespace(**ARGS | {"max_tokens": 12} | changes)
    with pytest.raises(ValueError, match=message):
        server.open_server(Generator(model, processor), args, args.max_tokens)
