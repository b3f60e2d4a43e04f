"""OpenAI's chat completions over HTTP, and a page to chat on, from one model.

    python generate.py --init runs/toy/align/model --serve --files data/toy

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.chat.completions.create(model="runs/toy/align/model", stream=True, messages=[
        {"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}},
            {"type": "text", "text": "How many circles?"}]}])

Pictures ("image_url") and clips ("video_url", as vLLM has it) come as data URLs, or as file://
below --files. Each request has a thread that reads it, checks it and decodes its pictures: what is
wrong with it is said from there, as a Refused. What is right becomes a Job, and waits. One thread
more owns the model. It takes all jobs that wait and want the same sampling, and decodes them
together; what their rows write goes back by each job's own queue.

Nothing that would change an answer is passed over: a parameter that is not honoured is refused.
What a tool has shown stands in the text as <sandbox_output>, its pictures beside it as "images";
when such a message is sent back as history, its text alone is read.
"""

import base64
import http.client
import io
import ipaddress
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
import urllib.request
import uuid
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from socketserver import TCPServer
from urllib.parse import unquote, urlsplit

from common.conversation import check_conversation, pictures_of, text_of
from common.media import MAX_PATH, MediaError, shortened
from common.rollout import CLOSE_CALL, code_ends, tool_turns

PAGE = Path(__file__).with_name("chat.html")

# All limits are ours: far above a chat with some pictures, and far below what fills a machine.
BODY = 32 << 20  # bytes of a request, and of all that it has fetched
HELD = 2 << 30  # bytes of all requests that wait for the model, with their pixels
READERS = 4  # requests whose pictures are decoded at once
CONNECTIONS = 512  # at once, a thread and a file each; a process may have 1024 files
RECEIVING = 300  # seconds in which a request must have come: 32 MB at 1 Mbit/s
SECONDS = 30  # for which a client may send or take nothing
FETCHING = 20  # seconds for all that one request fetches from the web
DECODING = 120  # seconds for which a request waits until its pictures are decoded
CLIPS = 1 << 35  # pixels of all frames of the clips that a request brings: 9 minutes of 1080p
ENDING = 1.0  # seconds that the end waits, at most, for requests that are being answered
GATHER = 0.5  # seconds that the model waits, at most, for requests that are being read
CHOICES = 8  # answers to one request ("n")
STOPS = 4  # strings that end an answer, as at OpenAI; each of so many characters:
STOP_LENGTH = 100
LONGEST_TOKEN = 128  # characters, of Qwen's vocabulary: so many blanks
LOW_DETAIL = 512 * 512  # pixels, as at OpenAI
LIMIT = (int, 1, 10**9)  # of an answer's tokens; what a model has room for is less
SEED = (int, -(2**63), 2**63 - 1)
PENALTIES = (0.01, 100)  # of repetitions; at 1e-38 logits overflow

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# These say nothing about the answer ..
NOTES = (
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_options "
    "prompt_cache_retention prediction"
).split()
# .. and these are taken only where they ask for nothing.
NEUTRAL = {
    "frequency_penalty": [0], "presence_penalty": [0], "logit_bias": [{}], "logprobs": [False],
    "top_logprobs": [0], "tools": [[]], "functions": [[]], "tool_choice": ["none", "auto"],
    "function_call": ["none", "auto"], "parallel_tool_calls": [True, False],
    "modalities": [["text"]], "response_format": [{"type": "text"}], "verbosity": ["medium"],
}
READ = (
    "model messages stream stream_options temperature top_p top_k repetition_penalty n seed stop "
    "max_tokens max_completion_tokens"
).split()

# OpenAI's codes for what MediaErrors say.
MEDIA_CODES = {
    "missing": "image_file_not_found", "outside": "invalid_image_url", "empty": "empty_image_file",
    "too_large": "image_too_large", "unsupported": "invalid_image_format",
}


class Refused(Exception):
    """What a client is told instead of an answer, in OpenAI's form."""

    def __init__(self, message, param=None, code=None, status=400, kind="invalid_request_error"):
        super().__init__(message)
        self.status = int(status)
        # What a client sent may be in them, megabytes of it.
        message, param = shortened(message, 300), param and shortened(param, 100)
        self.error = {"message": message, "type": kind, "param": param, "code": code}


def refuse_busy(what: str):
    why = f"Too many {what}; try again later"
    busy = HTTPStatus.TOO_MANY_REQUESTS
    raise Refused(why, None, "rate_limit_exceeded", busy, "rate_limit_error")


@dataclass(eq=False)
class Job:
    """A request that can be answered, and the way back to its thread."""

    sample: dict
    pictures: partial  # that loads them at full size, for tools
    sampling: tuple  # (name, value), ... of Generator.sample; jobs of one batch agree on it
    max_tokens: int
    n: int
    seed: int | None
    stop: list[str]
    cost: int  # bytes
    # (number of the answer, text, pictures), (number, Ended), or a Refused
    events: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    begun: bool = False  # something was written
    gone: bool = False  # nobody waits for the answer any more


@dataclass
class Ended:
    """The end of an answer: why, and how many tokens were written and read in it."""

    reason: str
    written: int
    read: int


# --------------------------------------------------------------------------------------------------
# 1. From a request to a job


def is_number(value, kind):
    return type(value) is int or (kind is float and type(value) is float)


def number(request: dict, name: str, kind: type, low, high, default=None):
    """A number of the request, or its default, between low and high."""
    value = request.get(name)
    value = default if value is None else value
    if value is None:
        return None
    what = "an integer" if kind is int else "a number"
    if not is_number(value, kind):
        raise Refused(f"{name} must be {what}, not {type(value).__name__}", name, "invalid_type")
    if not low <= value <= high:  # nor is NaN between them
        raise Refused(f"{name} must be from {low} to {high}, not {value}", name, "invalid_value")
    return value


def stops_of(request: dict) -> list[str]:
    stop = request.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(word, str) and word for word in stop):
        raise Refused("stop must be a text or a list of texts", "stop", "invalid_type")
    if len(stop) > STOPS or max(map(len, stop), default=0) > STOP_LENGTH:
        most = f"at most {STOPS} texts of at most {STOP_LENGTH} characters"
        raise Refused(f"stop: {most} are looked for", "stop", "invalid_value")
    return stop


def flag(request: dict, name: str, param=None) -> bool:
    value = request.get(name)
    if value is not None and type(value) is not bool:
        raise Refused(f"{param or name} must be true or false", param or name, "invalid_type")
    return bool(value)


def with_usage(request: dict) -> bool:
    """Whether a stream ends with the counts of its tokens."""
    options = request.get("stream_options") or {}
    if not isinstance(options, dict):
        raise Refused("stream_options must be an object", "stream_options", "invalid_type")
    for name in options.keys() - {"include_usage", "include_obfuscation"}:
        refuse_parameter(f"stream_options.{name}")
    return flag(options, "include_usage", "stream_options.include_usage")


def refuse_parameter(name: str):
    raise Refused(f"{name} is not supported", name, "unsupported_parameter")


def request_of(body: bytes) -> dict:
    """A body as JSON, without keys of no value, and with none that are not honoured."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise Refused(f"the body is no JSON: {e}", code="invalid_json") from None
    if not isinstance(request, dict):
        raise Refused("the body must be a JSON object", code="invalid_type")
    request = {key: value for key, value in request.items() if value is not None}
    for key, value in request.items():
        if key in NEUTRAL and value not in NEUTRAL[key]:
            refuse_parameter(key)
        if key not in (*READ, *NOTES, *NEUTRAL):
            why = f"Unrecognized request argument supplied: {key}"
            raise Refused(why, key, "unknown_parameter")
    return request


class Reader:
    """Makes jobs of requests. Used by many threads at once."""

    def __init__(self, generator, name: str, defaults: dict, files: str | None, remote: bool):
        self.processor = generator.processor
        self.context = generator.context
        self.name = name
        self.defaults = defaults  # of the numbers of a request
        self.files = files
        self.remote = remote
        self.decoding = threading.Semaphore(READERS)
        # Defaults out of their range are known before the first request.
        self.sampling({})
        number(defaults, "max_new_tokens", *LIMIT)
        number(defaults, "seed", *SEED)

    def sampling(self, request: dict) -> tuple:
        ranges = {
            "temperature": (float, 0, 2), "top_p": (float, 0, 1), "top_k": (int, 0, 10**6),
            "repetition_penalty": (float, *PENALTIES),
        }
        values = {
            name: number(request, name, *range_, self.defaults[name])
            for name, range_ in ranges.items()
        }
        values["top_p"] = max(values["top_p"], 1e-6)  # 0 keeps the most likely token, as this does
        return tuple(values.items())

    def job(self, request: dict, size: int) -> Job:
        """size: bytes of its body."""
        model = request.get("model", self.name)
        if model != self.name:
            why = f"The model `{str(model)[:200]}` does not exist; here is `{self.name}`"
            raise Refused(why, "model", "model_not_found", HTTPStatus.NOT_FOUND)
        how = {
            "sampling": self.sampling(request),
            "n": number(request, "n", int, 1, CHOICES, 1),
            "seed": number(request, "seed", *SEED, self.defaults["seed"]),
            "stop": stops_of(request),
        }
        limit = number(request, "max_tokens", *LIMIT)  # the older name
        limit = number(request, "max_completion_tokens", *LIMIT, limit)
        # All but the pictures is known to be right before the work of decoding them.
        web = Web()
        conversation = {"messages": self.messages(request.get("messages"), web)}
        if not self.decoding.acquire(timeout=DECODING):
            refuse_busy("requests wait for their pictures to be decoded")
        try:
            sample, limit = self.sample(conversation, limit)
        finally:
            self.decoding.release()
        as_loaded = dict(pixel_limit=self.processor.pixel_limit)
        pictures = partial(pictures_of, conversation, self.files, **as_loaded)
        cost = size + web.bytes + sample["patches"].nbytes
        return Job(sample=sample, pictures=pictures, max_tokens=limit, cost=cost, **how)

    def sample(self, conversation: dict, limit: int | None) -> tuple[dict, int]:
        """The conversation as a sample, and how many tokens its answer may have."""
        try:
            check_conversation(conversation)
            self.check_length(conversation)
            layout = self.processor.layout(conversation, self.files, generate=True)
            room = self.context - layout.tokens
            if room < (limit or 1):
                self.refuse_length(f"{layout.tokens} tokens and {limit or 1} to write")
            self.check_clips(layout)
            return self.processor.load(layout), limit or min(room, self.defaults["max_new_tokens"])
        except MediaError as e:
            code = MEDIA_CODES.get(e.reason, "invalid_image")
            # Which folder that is, and where links in it lead, is nobody's business.
            if e.reason == "outside":
                e = "a path leads outside of --files"
            elif e.detail.startswith("no base64"):
                code = "invalid_base64_image"
            raise Refused(e, "messages", code) from None
        except ValueError as e:
            raise Refused(e, "messages", "invalid_value") from None

    def check_clips(self, layout):
        """Of clips that hours would be decoded; one that lies below --files is its owner's."""
        brought = [m for m in layout.media if m.kind == "video" and m.name[:5].lower() == "data:"]
        pixels = sum(int(m.frames * m.height * m.width) for m in brought)
        if pixels > CLIPS:
            raise MediaError("clips", "too_large", f"{pixels:,} pixels, limit {CLIPS:,}")

    def check_length(self, conversation):
        """Of texts far too long, before the work of cutting them into tokens."""
        length = sum(len(text_of(message)) for message in conversation["messages"])
        if length > LONGEST_TOKEN * self.context:
            self.refuse_length(f"{length} characters")

    def refuse_length(self, wanted):
        why = f"This model's context is {self.context} tokens; the messages have {wanted}"
        raise Refused(why, "messages", "context_length_exceeded")

    # -- messages

    def messages(self, given, web) -> list[dict]:
        """OpenAI's messages in our form. Files are not looked at yet."""
        if not isinstance(given, list) or not given:
            what = "missing_required_parameter" if given is None else "invalid_type"
            raise Refused("messages must be a list with a message", "messages", what)
        if len(given) > self.context:  # and each has more than a token
            self.refuse_length(f"{len(given)} turns")
        messages = [self.message(one, f"messages[{i}]", web) for i, one in enumerate(given)]
        if messages[-1]["role"] != "user":
            raise Refused("the last message must be the user's", "messages", "invalid_value")
        return messages

    def message(self, given, where, web) -> dict:
        if not isinstance(given, dict):
            raise Refused(f"{where} must be an object", where, "invalid_type")
        role, content = given.get("role"), given.get("content")
        if not isinstance(role, str) or role not in ROLES:
            known = f"{where}.role must be one of {', '.join(ROLES)}"
            raise Refused(known, f"{where}.role", "invalid_value")
        for key, value in given.items():
            ours = key in ("role", "content", "name")  # a name says nothing that a role does not
            ours |= key == "images" and role == "assistant"
            if value and not ours:
                refuse_parameter(f"{where}.{key}")
        if isinstance(content, list) and content:
            at = f"{where}.content"
            if len(content) > self.context:
                self.refuse_length(f"{len(content)} parts in one")
            content = [self.part(part, role, f"{at}[{i}]", web) for i, part in enumerate(content)]
        elif not isinstance(content, str):
            why = f"{where}.content must be a text or a list of parts"
            raise Refused(why, f"{where}.content", "invalid_type")
        return {"role": ROLES[role], "content": content}

    def part(self, given, role, where, web) -> dict:
        kind = given.get("type") if isinstance(given, dict) else None
        if kind == "text" and isinstance(given.get("text"), str):
            return {"type": "text", "text": given["text"]}
        if kind not in ("image_url", "video_url") or role != "user":
            form = '{"type": "text", "text": ..}, in the user\'s messages also image_url, video_url'
            raise Refused(f"{where} must be {form}", where, "invalid_value")
        value = given.get(kind)
        if not isinstance(value, dict) or not isinstance(value.get("url"), str):
            raise Refused(f'{where}.{kind} must be {{"url": ".."}}', where, "invalid_type")
        name = kind.removesuffix("_url")
        item = {"type": name, name: self.source(value["url"], f"{where}.{kind}.url", web)}
        for key, extra in value.items():
            if key == "detail" and extra in ("auto", "low", "high") and name == "image":
                item |= {"max_pixels": LOW_DETAIL} if extra == "low" else {}
            elif key == "fps" and name == "video" and extra is not None:
                item["fps"] = number(value, "fps", float, 0.01, 1000)
            elif key != "url" and extra is not None:
                refuse_parameter(f"{where}.{kind}.{key}")
        return item

    def source(self, url, where, web) -> str:
        """What the reader of media opens: a data URL, or a path relative to self.files."""
        if url[:5].lower() == "data:":
            return url
        if len(url) > 3 * MAX_PATH:  # each character as %xx: looking up a long path takes long
            raise Refused(f"{where}: a URL of {len(url):,} characters", where, "invalid_image_url")
        try:
            parts = urlsplit(url)
            whole = parts.netloc in ("", "localhost") and parts.path[:1] == "/"
            if parts.scheme == "file" and whole and self.files:
                real = os.path.realpath(unquote(parts.path))
                # What leads out of it, begins with "..", and is refused where it would be opened.
                return os.path.relpath(real, os.path.realpath(self.files))
        except ValueError as e:
            raise Refused(f"{where}: {e}", where, "invalid_image_url") from None
        if parts.scheme in ("http", "https") and self.remote:
            return web.fetched(url, where)
        known = ["data:image/png;base64,.."]
        known += ["file:///WHOLE/PATH"] * bool(self.files)
        known += ["http://..", "https://.."] * self.remote
        why = f"{where}: URLs that are read here are {', '.join(known)}"
        raise Refused(why, where, "invalid_image_url")


class InTime(io.RawIOBase):
    """What comes on a connection, until it is late: TimeoutError. A socket's own limit starts again
    with every byte that drips in."""

    def __init__(self, connection: socket.socket, seconds: float):
        self.connection = connection
        self.late = time.monotonic() + seconds

    def readable(self):
        return True

    def readinto(self, buffer):
        left = self.late - time.monotonic()
        if left <= 0:
            raise TimeoutError("it comes too slowly")
        self.connection.settimeout(min(SECONDS, left))
        try:
            return self.connection.recv_into(buffer)
        finally:
            self.connection.settimeout(SECONDS)


class Web:
    """What one request fetches: at most BODY bytes, of which `bytes` have come, in FETCHING."""

    def __init__(self):
        self.bytes = 0
        self.late = None  # from the first URL on
        self.opener = urllib.request.OpenerDirector()  # the usual one would open files as well
        plain, secure = urllib.request.HTTPHandler(), urllib.request.HTTPSHandler()
        plain.http_open = partial(plain.do_open, partial(self.connect, http.client.HTTPConnection))
        secure.https_open = partial(
            secure.do_open, partial(self.connect, http.client.HTTPSConnection)
        )
        for handler in (
            plain, secure, urllib.request.ProxyHandler(), urllib.request.UnknownHandler(),
            urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPRedirectHandler(),
            urllib.request.HTTPErrorProcessor(),
        ):
            self.opener.add_handler(handler)

    def connect(self, kind, host, timeout, **how):
        connection = kind(host, timeout=max(0.001, min(timeout, self.left())), **how)
        connection.response_class = self.response
        return connection

    def left(self) -> float:
        return self.late - time.monotonic()

    def response(self, connection, *args, **how):
        response = http.client.HTTPResponse(connection, *args, **how)
        response.whole = response.fp  # which keeps the connection open
        response.fp = io.BufferedReader(InTime(connection, self.left()))
        return response

    def fetched(self, url: str, where: str) -> str:
        """A picture or clip as a data URL."""
        data = bytearray()
        self.late = self.late or time.monotonic() + FETCHING
        try:
            with self.opener.open(url, timeout=FETCHING) as answer:
                while piece := answer.read1(1 << 16):
                    data += piece
                    self.bytes += len(piece)
                    if self.bytes > BODY:
                        raise OSError(f"more than {BODY} bytes in one request")
        except TimeoutError:
            why = f"{url[:200]} was not read within the {FETCHING} seconds of a request"
            raise Refused(why, where, "failed_to_download_image") from None
        except (OSError, ValueError, http.client.HTTPException) as e:  # URLError is an OSError
            why = f"{url[:200]} cannot be fetched: {e}"
            raise Refused(why, where, "failed_to_download_image") from None
        return "data:;base64," + base64.b64encode(data).decode()


# --------------------------------------------------------------------------------------------------
# 2. The thread that owns the model


class Answer:
    """What one row says, as far as it can be sent: a stop string may have begun at its end."""

    def __init__(self, job: Job, number: int):
        self.job = job
        self.number = number
        self.held = ""
        self.stopped = False

    def write(self, piece: str):
        """Text of the model."""
        if self.stopped:
            return
        text = self.held + piece
        ends = [text.find(word) for word in self.job.stop if word in text]
        if ends:
            self.stopped = True
            self.send(text[: min(ends)])
            return
        starts = [word[:n] for word in self.job.stop for n in range(1, len(word))]
        keep = max((len(start) for start in starts if text.endswith(start)), default=0)
        self.held = text[len(text) - keep :]
        self.send(text[: len(text) - keep])

    def send(self, text: str, images=()):
        if text or images:
            self.job.begun = True
            self.job.events.put((self.number, text, list(images)))

    def show(self, seen):
        """What a tool has shown."""
        text = f"{self.held}<sandbox_output>{seen.text}</sandbox_output>"
        self.held = ""
        self.send(text, map(png_url, seen.images))

    def end(self, response):
        if not self.stopped:
            self.send(self.held)
        written = sum(response.sampled)
        reason = "stop" if response.finished or self.stopped else "length"
        ended = Ended(reason, written, len(response.sampled) - written)
        self.job.begun = True  # an end without text too: it must not come twice
        self.job.events.put((self.number, ended))


def png_url(picture) -> str:
    png = io.BytesIO()
    picture.save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


class Worker:
    """Jobs wait here; its thread answers them in batches, the oldest first."""

    def __init__(self, generator):
        self.generator = generator
        self.changed = threading.Condition()
        self.waiting = deque()
        self.arriving = 0  # bytes of bodies that are being read, or looked at
        self.reading = 0  # requests that will be jobs soon
        self.closed = False
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def close(self):
        """Ends all answers at their next token, and the thread: one that was inside of PyTorch when
        the program ends would abort it."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    def hold(self, size: int):
        """Counts bytes of a body; negative ones have been let go."""
        with self.changed:
            if size > 0 and self.held() + size > HELD:
                refuse_busy("requests wait for the model")
            self.arriving += size

    def held(self) -> int:
        return self.arriving + sum(other.cost for other in self.waiting)

    def read(self, reader: Reader, request: dict, size: int) -> Job:
        """Makes a job of a request, and lets it wait."""
        with self.changed:
            self.reading += 1
        try:
            job = reader.job(request, size)
            with self.changed:
                if self.waiting and self.held() + job.cost > HELD:
                    refuse_busy("requests wait for the model")
                self.waiting.append(job)
        finally:
            with self.changed:
                self.reading -= 1  # what was read waits by now
                self.changed.notify()
        return job

    def take(self) -> list[Job]:
        """All jobs that are sampled as the oldest one is; none where it has closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.closed)
            if self.closed:
                return []
            # Those that came together are answered together.
            self.changed.wait_for(lambda: not self.reading, GATHER)
            sampling = self.waiting[0].sampling
            jobs = [job for job in self.waiting if job.sampling == sampling]
            self.waiting = deque(job for job in self.waiting if job.sampling != sampling)
        return [job for job in jobs if not job.gone]

    def work(self):
        while not self.closed:
            self.answer(self.take())

    def answer(self, jobs: list[Job]):
        """Whatever happens in it, the next jobs are answered too."""
        if not jobs:
            return
        try:
            self.decode(jobs)
        except Exception as error:
            traceback.print_exc()
            # One of them may be the cause: those of which nothing was sent are asked alone.
            again = [job for job in jobs if not job.begun and len(jobs) > 1]
            why = f"The model failed: {type(error).__name__}"
            for job in jobs:
                if job not in again:
                    status = HTTPStatus.INTERNAL_SERVER_ERROR
                    job.events.put(Refused(why, status=status, kind="server_error"))
            for job in again:
                self.answer([job])

    def decode(self, jobs: list[Job]):
        answers = [Answer(job, number) for job in jobs for number in range(job.n)]
        tokenizer = self.generator.processor.tokenizer
        tools = tool_turns(self.generator, [answer.job.pictures for answer in answers])
        code_ended = code_ends(tokenizer)

        def ends(row):
            answer = answers[row.index]
            if answer.stopped or answer.job.gone or self.closed:
                row.left = 0
                return True
            return code_ended is not None and code_ended(row)

        def extend(row):
            sample = tools(row)
            if sample is None or row.left <= 0:
                answers[row.index].end(row.response)
                return None
            answers[row.index].show(row.response.observations[-1])
            return sample

        self.generator.sample(
            [answer.job.sample for answer in answers],
            [answer.job.max_tokens for answer in answers],
            # A seed gives the same answer in any batch.
            seed=[None if a.job.seed is None else f"{a.job.seed}/{a.number}" for a in answers],
            stop=[tokenizer.special[CLOSE_CALL]],
            extend=extend,
            ends=ends,
            stream=lambda i, piece: answers[i].write(piece),
            **dict(jobs[0].sampling),
        )


# --------------------------------------------------------------------------------------------------
# 3. HTTP


# What a client gets, unread, where there are too many.
BUSY = b"""HTTP/1.0 503 Busy\r\nContent-Type: application/json\r\n\r\n{"error": {
"message": "Too many connections; try again later", "type": "server_error", "param": null,
"code": "overloaded"}}"""


class Server(ThreadingHTTPServer):
    """server_address[1] is its port. url: where a browser on this machine finds it."""

    request_queue_size = 128  # connections that come at once

    def __init__(self, host: str, port: int, reader: Reader, worker: Worker):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)
        self.reader = reader
        self.worker = worker
        self.places = threading.Semaphore(CONNECTIONS)
        self.created = int(time.time())
        self.local = is_local(self.server_address[0])
        name = f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self.server_address[1]}"

    def process_request(self, request, address):
        if self.places.acquire(blocking=False):
            super().process_request(request, address)
            return
        with suppress(OSError):
            request.settimeout(0)
            request.sendall(BUSY)
            request.shutdown(socket.SHUT_WR)
        self.close_request(request)

    def shutdown_request(self, request):  # the end of every one that has a place
        super().shutdown_request(request)
        self.places.release()

    def close(self):
        """Ends the answers and the worker, and waits a moment for the threads of the requests.

        A thread that frees tensors while the program ends would abort it, like the worker's.
        """
        self.server_close()
        self.worker.close()
        until = time.monotonic() + ENDING
        for _ in range(CONNECTIONS):  # a place is free again when its thread is done
            if not self.places.acquire(timeout=max(0.0, until - time.monotonic())):
                return

    def server_bind(self):
        TCPServer.server_bind(self)  # not HTTPServer's, which asks the network for a name


def is_local(host: str | None) -> bool:
    """Whether a name or address is this machine's alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Handler(BaseHTTPRequestHandler):
    """One connection with one request, in a thread of its own.

    As in HTTP/1.0 the connection ends with the answer: so nothing that is left unread of a request
    is taken for the next one, and a stream needs no other end.
    """

    protocol_version = "HTTP/1.0"
    server_version = "nanoKeye"
    timeout = SECONDS

    def setup(self):
        super().setup()
        self.rfile = io.BufferedReader(InTime(self.connection, RECEIVING))
        self.held = 0  # bytes of the body

    def do_GET(self):
        self.answered(self.get)

    def do_POST(self):
        self.answered(self.post)

    def answered(self, method):
        """Calls get or post. Whatever happens in it ends this request alone."""
        try:
            self.path = unquote(self.path.partition("?")[0])
            self.check_origin()
            method()
        except Refused as refused:
            self.refuse(refused)
        except (ConnectionError, TimeoutError):  # the client has gone
            pass
        except Exception as error:
            traceback.print_exc()
            why = f"The server failed: {type(error).__name__}"
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            self.refuse(Refused(why, status=status, kind="server_error"))

    def check_origin(self):
        """Pages of other sites that this machine's browser shows must not use the server."""
        host = self.headers.get("Host", "localhost")
        origin = self.headers.get("Origin", f"http://{host}")
        name = host.rpartition(":")[0] if host[-1:].isdigit() and ":" in host else host
        foreign = self.server.local and not is_local(name.strip("[]"))  # a site's name for it
        if foreign or origin.partition("://")[2] != host:
            raise Refused("requests of other sites are not answered", status=HTTPStatus.FORBIDDEN)

    # -- what there is

    def get(self):
        model = {
            "id": self.server.reader.name, "object": "model", "created": self.server.created,
            "owned_by": "nanokeye",
        }
        if self.path == "/":
            self.send("text/html; charset=utf-8", PAGE.read_bytes())
        elif self.path == "/health":
            self.send_json({"status": "ok"})
        elif self.path == "/v1/models":
            self.send_json({"object": "list", "data": [model]})
        elif self.path == f"/v1/models/{model['id']}":
            self.send_json(model)
        elif self.path == "/v1/chat/completions":
            raise Refused("ask by POST", status=HTTPStatus.METHOD_NOT_ALLOWED)
        else:
            self.refuse_path()

    def refuse_path(self):
        why = f"Invalid URL ({self.command} {self.path[:200]})"
        raise Refused(why, code="unknown_url", status=HTTPStatus.NOT_FOUND)

    def post(self):
        try:
            body = self.body()
            if self.path != "/v1/chat/completions":
                self.refuse_path()
            request = request_of(body)
            stream, usage = flag(request, "stream"), with_usage(request)
            job = self.server.worker.read(self.server.reader, request, len(body))
            del body, request
        finally:
            self.server.worker.hold(-self.held)
        try:
            if stream:
                self.stream(job, usage)
            else:
                self.send_json(self.completion(job))
        finally:
            job.gone = True  # no row goes on for nobody

    def body(self) -> bytes:
        """What was posted, at most BODY bytes of it."""
        try:
            size = int(self.headers["Content-Length"])
        except (TypeError, ValueError):
            size = -1
        if size < 0 or "Transfer-Encoding" in self.headers:
            raise Refused("Content-Length is needed", status=HTTPStatus.LENGTH_REQUIRED)
        if size > BODY:
            # Read all the same, as a client that is still sending would not see the answer.
            for _ in range(min(size, 8 * BODY) >> 16):
                self.rfile.read(1 << 16)
            why = f"the body has {size} bytes, at most {BODY} are read"
            status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
            raise Refused(why, code="request_too_large", status=status)
        body = bytearray()
        while len(body) < size:
            try:
                piece = self.rfile.read1(min(1 << 16, size - len(body)))
            except TimeoutError:
                why = f"{len(body)} of {size} bytes have come in time"
                raise Refused(why, status=HTTPStatus.REQUEST_TIMEOUT) from None
            if not piece:
                raise ConnectionError("the client has gone")
            self.server.worker.hold(len(piece))
            self.held += len(piece)
            body += piece
        return bytes(body)

    # -- answers

    def events(self, job: Job):
        """What comes of a job, until all its answers have ended. Refused where it fails."""
        left = job.n
        while left:
            try:
                event = job.events.get(timeout=1)
            except queue.Empty:
                if self.client_has_gone():
                    raise ConnectionError("the client has gone") from None
                continue
            if isinstance(event, Refused):
                raise event
            left -= isinstance(event[1], Ended)
            yield event

    def client_has_gone(self) -> bool:
        """Also of one that only says that it sends no more: from here both look the same."""
        self.connection.settimeout(0)
        try:
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        finally:
            self.connection.settimeout(self.timeout)

    def head(self, kind) -> dict:
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()),
            "model": self.server.reader.name,
        }

    def completion(self, job: Job) -> dict:
        messages = [{"role": "assistant", "content": "", "refusal": None} for _ in range(job.n)]
        ended = [None] * job.n
        for number, *said in self.events(job):
            if isinstance(said[0], Ended):
                ended[number] = said[0]
                continue
            text, images = said
            messages[number]["content"] += text
            if images:
                messages[number].setdefault("images", []).extend(map(image_part, images))
        choices = [
            {"index": i, "message": message, "finish_reason": end.reason, "logprobs": None}
            for i, (message, end) in enumerate(zip(messages, ended))
        ]
        return self.head("chat.completion") | {"choices": choices, "usage": usage_of(job, ended)}

    def stream(self, job: Job, usage: bool):
        head = self.head("chat.completion.chunk") | ({"usage": None} if usage else {})

        def send(choices, **more):
            self.send_event(head | {"choices": choices} | more)

        def delta(number, delta, reason=None):
            send([{"index": number, "delta": delta, "finish_reason": reason, "logprobs": None}])

        events = self.events(job)
        first = next(events)  # where the model fails at once, the status can still say so
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.end_headers()
        ended = []
        try:
            for number in range(job.n):
                delta(number, {"role": "assistant", "content": ""})
            for number, *said in chain([first], events):
                if isinstance(said[0], Ended):
                    ended.append(said[0])
                    delta(number, {}, said[0].reason)
                    continue
                text, images = said
                shown = {"images": [image_part(url) for url in images]} if images else {}
                delta(number, {"content": text} | shown)
        except Refused as refused:
            self.send_event({"error": refused.error})
            return
        if usage:
            send([], usage=usage_of(job, ended))
        self.wfile.write(b"data: [DONE]\n\n")

    def send_event(self, data: dict):
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())

    def send_json(self, data: dict, status=HTTPStatus.OK):
        self.send("application/json", json.dumps(data).encode(), status)

    def send(self, kind: str, data: bytes, status=HTTPStatus.OK):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Content-Type-Options", "nosniff")
        # The page holds all that it needs; it can ask this server alone.
        policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        policy += "img-src data: blob:; media-src data: blob:; connect-src 'self'"
        self.send_header("Content-Security-Policy", policy)
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, refused: Refused):
        with suppress(OSError):  # the client has gone
            self.send_json({"error": refused.error}, refused.status)

    def send_error(self, code, message=None, explain=None):
        """What is no HTTP, as the base class finds out, is refused in the same form."""
        self.refuse(Refused(message or HTTPStatus(code).phrase, status=code))


def image_part(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def usage_of(job: Job, ended: list[Ended]) -> dict:
    """What tools have shown counts as read."""
    read = len(job.sample["tokens"]) + sum(end.read for end in ended)
    written = sum(end.written for end in ended)
    return {
        "prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written,
    }


def open_server(generator, args, max_tokens: int) -> Server:
    """A server that listens; serve_forever() answers. args: of generate.py; max_tokens: of an
    answer, where a request says nothing. ValueError where they are out of range, or cannot be."""
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    defaults = {name: getattr(args, name) for name in names} | {"max_new_tokens": max_tokens}
    if args.files and not os.path.isdir(args.files):
        raise ValueError(f"--files {args.files}: no such folder")
    try:
        reader = Reader(generator, str(args.init), defaults, args.files, args.allow_remote)
        return Server(args.host, args.port, reader, Worker(generator))
    except Refused as e:
        raise ValueError(f"--{e}".replace("_", "-")) from None  # of a default: its flag is named
    except (OSError, OverflowError) as e:
        raise ValueError(f"--host {args.host} --port {args.port}: {e}") from None


def serve(generator, args, max_tokens: int):
    """Answers until ctrl-C or SIGTERM; also where a shell in the background has both ignored."""
    server = open_server(generator, args, max_tokens)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    print(f"{server.url} is the page, {server.url}/v1 the API; ctrl-C ends", file=sys.stderr)
    if not server.local:
        print("whoever reaches this address can ask; nobody is asked for a key", file=sys.stderr)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.close()
