"""`HTTPReward` with a local server that is slow, breaks off, or answers wrongly."""

import contextlib
import json
import socket
import sys
import threading
import time

import pytest

import local_server
from lit_rlhf.errors import InputError
from lit_rlhf.rewards import HTTPReward, Scorer
from scoring import component, flat, score


class Server:
    """A server with a list of answers, each a function of the handler and the request; the last one is repeated."""

    def __init__(self, *answers):
        self.requests, self.headers, self.answers = [], [], list(answers)
        self.http, address = local_server.serve(self.answer)
        self.url = f"{address}/score"

    def answer(self, handler, body):
        self.requests.append(body)
        self.headers.append(handler.headers)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        answer(handler, body)


def reply(content, status=200, **headers):
    def answer(handler, body):
        text = content if isinstance(content, str) else json.dumps(content)
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(text.encode())

    return answer


def lengths(handler, body):
    reply({"scores": [len(text) for text in body["completions"]]})(handler, body)


def breaks_off(handler, body):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"scores": [1')
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)


def slow(handler, body):
    time.sleep(1.0)
    lengths(handler, body)


def drips(handler, body):
    """Send a byte now and then, so that no single read takes long."""
    handler.send_response(200)
    handler.end_headers()
    try:
        for _ in range(40):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        pass


@pytest.fixture
def serve():
    servers = []

    def start(*answers):
        servers.append(Server(*answers))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def reward(server, **options):
    return HTTPReward(server.url, **{"backoff": 0.0, "retries": 2, "timeout": 10.0, **options})


def test_a_request_holds_prompts_completions_and_the_columns_asked_for(serve):
    server = serve(reply({"scores": [0.5, None, 2]}))
    scores = score([reward(server, columns=["answer"])], answer=["x", "y", None], secret=["a", "b", "c"])
    assert component(scores, "http_reward").nan_to_num(-1).tolist() == [0.5, -1, 2]
    assert server.requests == [
        {"prompts": ["p0", "p1", "p2"], "completions": ["c0", "c1", "c2"], "columns": {"answer": ["x", "y", None]}}
    ]
    with pytest.raises(ValueError, match=r"'http_reward' asks for \['answer'\]"):
        Scorer([reward(server, columns=["answer"])]).check(["secret"])


def test_completions_are_sent_in_batches(serve):
    server = serve(lengths)
    texts = ["a" * i for i in range(7)]
    scorer = Scorer([reward(server, batch_size=3, concurrency=2)])
    scores = scorer(["p"], [texts], [[[1]] * 7], [[True] * 7])
    assert scores.rewards.tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    assert sorted(len(request["completions"]) for request in server.requests) == [1, 3, 3]


def test_messages_are_sent_as_they_are(serve):
    server = serve(reply({"scores": [1]}))
    prompt, completion = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    Scorer([reward(server)])([prompt], [[completion]], [[[1]]], [[True]])
    assert server.requests[0]["prompts"] == [prompt] and server.requests[0]["completions"] == [completion]


@pytest.mark.parametrize(
    "failure", [reply("busy", 429, Retry_After="0"), reply("oops", 503), breaks_off], ids=["429", "503", "breaks off"]
)
def test_transient_failures_are_retried(serve, failure):
    server = serve(failure, failure, lengths)
    assert flat(score([reward(server)])) == [2, 2, 2]
    assert len(server.requests) == 3


def test_a_server_that_is_tried_for_long_is_named_in_a_warning(serve):
    server = serve(*[reply("busy", 503)] * 4, lengths)
    with pytest.warns(UserWarning, match=r"status 503: busy: tried 4 times, and up to \d+ times more"):
        assert flat(score([reward(server, retries=5)])) == [2, 2, 2]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (slow, "did not answer within 0.2 s"),
        (drips, "did not answer within 0.2 s"),
        (breaks_off, r"can't be reached or broke off \(RemoteProtocolError"),
        (reply("busy", 503), "answered with status 503: busy"),
        (reply("no such page", 404), "answered with status 404: no such page"),
        (reply("", 302, Location="http://127.0.0.1:1/"), "answered with status 302"),
        (reply("<html>\n<h1>Sign in</h1>" + "x" * 500), r"answered <html> <h1>Sign in</h1>x+\.\.\., which is not JSON"),
        (reply([1, 2, 3]), r"answered \[1, 2, 3\], which is not JSON of the form"),
        (reply({"scores": [1, 2]}), "which has 2 scores for 3 completions"),
        (reply('{"scores": [1, NaN, 2]}'), "where nan is neither a finite number nor null"),
        (reply({"scores": [1, "2", 3]}), "where '2' is neither a finite number nor null"),
        (reply({"scores": [1, True, 3]}), "where True is neither"),
        (reply({"scores": [1, 1e300, 3]}), r"where 1e\+300 is neither"),
    ],
)
def test_a_server_that_never_answers_well_stops_the_run_with_one_sentence(serve, answer, message):
    server = serve(answer)
    with pytest.raises(InputError, match=f"'http_reward': {server.url} .*{message}") as failure:
        score([reward(server, timeout=0.2, retries=1)])
    assert "\n" not in str(failure.value) and len(str(failure.value)) < 300


def test_wrong_answers_of_a_server_that_worked_are_failures(serve):
    server = serve(lengths, reply("<html>gateway</html>"), lengths)
    scorer = Scorer([reward(server, retries=0)])

    def call():
        return scorer(["p"], [["a", "bb"]], [[[1], [2]]], [[True, True]])

    assert call().rewards.tolist() == [[1, 2]]
    with pytest.warns(UserWarning, match=r"failed for 2 of 2 completions.*<html>gateway</html>"):
        assert not call().valid.any()
    assert call().rewards.tolist() == [[1, 2]]


def test_no_server_at_the_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/score"
    with pytest.raises(InputError, match=rf"{url} can't be reached or broke off \(ConnectError"):
        score([HTTPReward(url, retries=0)])


def test_the_api_key_is_sent_and_not_shown(serve, monkeypatch):
    monkeypatch.setenv("SCORES_KEY", "s3cret")
    server = serve(reply("bad key s3cret", 401))
    asked = reward(server, api_key_env="SCORES_KEY")
    with pytest.raises(InputError, match="status 401: bad key \\*\\*\\*") as failure:
        score([asked])
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in str(failure.value) + repr(vars(asked))


@pytest.mark.parametrize("where", ["reason", "body"])
def test_a_key_that_the_server_repeats_in_another_form_is_not_shown(where, serve, monkeypatch):
    monkeypatch.setenv("SCORES_KEY", "s3cret/abc")

    def echoes(handler, body):
        if where == "reason":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nAuthorization Bearer s3cret/abc\r\n\r\n")
        else:
            reply(r'{"error": "bad key s3cret\/abc"}', 403)(handler, body)

    with pytest.raises(InputError, match=r"\*\*\*") as failure:
        score([reward(serve(echoes), retries=0, api_key_env="SCORES_KEY")])
    assert "s3cret" not in str(failure.value)


def test_a_request_ends_after_the_timeout_even_in_its_headers(serve):
    finished = threading.Event()

    def drips_headers(handler, body):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        with contextlib.suppress(OSError):
            while not finished.wait(0.05):
                handler.wfile.write(b"x")
                handler.wfile.flush()

    with pytest.raises(InputError, match=r"did not answer within 0\.2 s"):
        score([reward(serve(drips_headers), timeout=0.2, retries=0)])
    assert not finished.is_set()
    finished.set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "http://localhost:80a0/score"}, "'http://localhost:80a0/score' is not the address of a server"),
        ({"url": "http://me:SECRET@[::1/score"}, r"^'\[::1/score' is not the address of a server"),
        ({"url": "localhost:8000"}, "'localhost:8000' is not the address of a server"),
        ({"url": "https://me:pw@host/score"}, "^the url of host holds a user or a password: give"),
        ({"url": "https://SECRET@host/score"}, "^the url of host holds a user or a password: give"),
        ({"url": "htps://me:pw@host/score?key=SECRET"}, "^'host/score' is not the address of a server"),
        ({"url": "host:80/score?key=SECRET"}, "^'host:80/score' is not the address of a server"),
        ({"url": "http://host/", "api_key_env": "NO_SUCH_KEY"}, "the environment variable NO_SUCH_KEY .* is not set"),
        ({"url": "http://host/", "timeout": 0.0}, "timeout=0.0"),
    ],
)
def test_options_are_checked_at_construction(options, message):
    with pytest.raises(InputError, match=message):
        HTTPReward(**options)


def test_a_column_that_is_not_json_is_named(serve):
    with pytest.raises(InputError, match="the request is not JSON: Object of type set is not JSON serializable"):
        score([reward(serve(lengths), columns=["tags"])], tags=[{1}, {2}, {3}])


def test_without_its_package_it_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(ImportError, match=r"pip install 'lit_rlhf\[http\]'"):
        HTTPReward("http://host/")
