"""The server answers those who know its token, by its own name, and only what it is there for."""

import http.client
import json
import os
import random
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlencode

import pytest

from declip_cli.data.catalog import open_dataset
from declip_cli.errors import EvaluateError
from declip_cli.evaluate.collection import open_collection
from declip_cli.evaluate.encoding import FeatureOptions
from declip_cli.serve.searcher import Searcher
from declip_cli.serve.server import MAX_BODY_BYTES, SearchServer
from tests.serve.browser_pages import BrowserPage

EVIL = """<script>document.title="owned"</script><img src=x onerror="document.title='owned'">"&'</li>\u202e"""
FRESH = FeatureOptions(use_cache=False, threads=1, precision="fp32")
NUM_IMAGES = 130


@pytest.fixture(scope="module")
def given():
    return []


@pytest.fixture(scope="module")
def server(tmp_path_factory, make_image, tiny_model, given):
    folder = tmp_path_factory.mktemp("photos")
    names = [f"{number:03}.png" for number in range(NUM_IMAGES - 1)] + ["a<b onload=x>'&\".png"]
    for number, name in enumerate(names):
        (folder / name).write_bytes(make_image(number, format="PNG"))
    rows = [json.dumps({"file": name, "caption": f"{EVIL} {name}"}) for name in names]
    (folder / "captions.jsonl").write_text("\n".join(rows))
    collection = open_collection(tiny_model, open_dataset(str(folder)), options=FRESH)
    with SearchServer(Searcher(tiny_model, collection, FRESH), log=given.append) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, path="", *, method="GET", body=None, token=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, f"/{server.token if token is None else token}/{path}", body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, json.loads(content) if response.headers["Content-Type"] == "application/json" else content


def send_bytes(server, data):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(65536), b""))


def test_a_shell_gets_hits_as_json(server):
    response, answer = ask(server, "search?" + urlencode({"text": "a red bus", "k": 3}))
    assert response.status == 200
    assert answer["query"] == "a red bus"
    assert [hit["rank"] for hit in answer["hits"]] == [1, 2, 3]
    assert answer["hits"][0].keys() == {"id", "rank", "score", "path", "caption"}
    assert EVIL in answer["hits"][0]["caption"]


def test_an_image_in_the_body_finds_itself(server, make_image):
    response, answer = ask(server, "search?k=1", method="POST", body=make_image(7, format="PNG"))
    assert response.status == 200
    assert answer["hits"][0]["path"].endswith("/007.png")
    assert answer["hits"][0]["score"] == pytest.approx(1, abs=1e-5)


def test_images_are_sent_as_jpegs_of_our_own_making(server):
    for path in ("thumbnails/5", "images/5"):
        response, content = ask(server, path)
        assert response.headers["Content-Type"] == "image/jpeg"
        assert content.startswith(b"\xff\xd8\xff")
        assert "immutable" in response.headers["Cache-Control"]


def test_every_answer_forbids_inline_scripts_other_origins_and_guessing_of_types(server):
    for path in ("", "page.js", "page.css", "info", "search", "thumbnails/1", "thumbnails/999", "nothing"):
        headers = ask(server, path)[0].headers
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';")
        assert "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert not [name for name in headers if name.lower().startswith("access-control")]


def test_the_page_itself_holds_no_script_style_or_address_of_elsewhere(server):
    _, page = ask(server)
    assert page.count(b"<script") == page.count(b'<script src="page.js" defer></script>') == 1
    assert b"<style" not in page
    for name in ("", "page.js", "page.css"):
        assert b"//" not in ask(server, name)[1].replace(b"// ", b"")
    assert b"innerHTML" not in ask(server, "page.js")[1]


@pytest.mark.parametrize("token", ["", "x", "%00"])
def test_a_wrong_token_is_refused(server, token):
    response, answer = ask(server, "search?text=x", token=token)
    assert response.status == 403
    assert "token" in answer["error"]


def test_a_token_that_is_no_text_is_refused(server):
    host = f"Host: 127.0.0.1:{server.server_port}\r\n\r\n"
    assert b" 403 " in send_bytes(server, b"GET /\xe9\xff/ HTTP/1.1\r\n" + host.encode())


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost:80", ""])
def test_a_name_of_another_is_refused_even_with_the_token(server, host):
    response, _ = ask(server, "search?text=x", Host=host)
    assert response.status == 421


def test_the_server_goes_by_localhost_too(server):
    assert ask(server, "info", Host=f"localhost:{server.server_port}")[0].status == 200


@pytest.mark.parametrize(
    "path",
    [
        "../../etc/passwd",
        "..%2f..%2fetc/passwd",
        "page.html/../page.js",
        "thumbnails/../../x",
        "thumbnails/-1",
        "images//etc/passwd",
        "thumbnails/%31",
        "images/99999999999999999999",
    ],
)
def test_only_numbers_of_images_lead_to_files(server, path):
    assert ask(server, path)[0].status in (400, 404)


def test_bodies_are_bounded_and_need_a_length(server):
    host = f"Host: 127.0.0.1:{server.server_port}\r\n"
    for headers, status in (
        (f"Content-Length: {MAX_BODY_BYTES + 1}\r\n", b"413"),
        (f"Content-Length: {10**30}\r\n", b"413"),
        ("Content-Length: -1\r\n", b"411"),
        ("Transfer-Encoding: chunked\r\n", b"411"),
        ("", b"411"),
    ):
        found = send_bytes(server, f"POST /{server.token}/search HTTP/1.1\r\n{host}{headers}\r\n".encode())
        assert found.split()[1] == status
    assert ask(server, "info", method="POST", body=b"x")[0].status == 413


def test_the_body_of_a_get_is_not_taken_for_another_request(server):
    host, second = f"Host: 127.0.0.1:{server.server_port}\r\n", b"GET /x HTTP/1.1\r\n\r\n"
    head = f"GET /{server.token}/info HTTP/1.1\r\n{host}Content-Length: {len(second)}\r\n\r\n"
    assert send_bytes(server, head.encode() + second).count(b"HTTP/1.1 ") == 1


def test_words_that_cannot_be_read_are_the_clients_fault(server):
    for words in ("text=%ff", "text=x&k=0x", "&".join(["text=x"] * 70), "like=999999"):
        response, answer = ask(server, f"search?{words}")
        assert response.status == 400
        assert answer["error"]
    assert ask(server, "search?k=1", method="POST", body=b"junk")[0].status == 400


def test_random_requests_never_end_the_server(server, given):
    draw = random.Random(0)
    pieces = [b"GET ", b"POST ", b"PUT ", b"/", server.token.encode(), b"search?text=", b"\x00\xff", b"%", b"../"]
    pieces += [b" HTTP/1.1\r\n", b"\r\n", f"Host: 127.0.0.1:{server.server_port}".encode(), b"Content-Length: 9\r\n"]
    for _ in range(150):
        send_bytes(server, b"".join(draw.choices(pieces, k=draw.randint(1, 14))))
    assert ask(server, "info")[0].status == 200
    assert given == []


def test_fifty_requests_at_once_are_all_answered_as_one_alone_is(server):
    paths = [f"search?text=word{number}&k=5" for number in range(50)]
    alone = [ask(server, path)[1]["hits"] for path in paths]
    with ThreadPoolExecutor(50) as pool:
        together = [answer["hits"] for _, answer in pool.map(lambda path: ask(server, path), paths)]
    assert together == alone


def test_a_fault_of_ours_is_told_and_the_server_goes_on(server, given, monkeypatch):
    def fail(_):
        raise RuntimeError("broken")

    monkeypatch.setattr(server.searcher, "search", fail)
    assert ask(server, "search?text=x")[0].status == 500
    assert "broken" in given.pop()


def test_a_port_in_use_is_an_error_with_a_fix(server):
    with pytest.raises(EvaluateError, match="cannot listen on port") as caught:
        SearchServer(server.searcher, port=server.server_port, log=print)
    assert "--port 0" in caught.value.remedy


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    names = (os.environ.get("DECLIP_BROWSER", ""), "chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, filter(None, names))), "")
    if not found:
        told = "needs a browser: apt-get install chromium, or DECLIP_BROWSER=path"
        pytest.fail(told) if os.environ.get("CI") else pytest.skip(told)
    page = BrowserPage(found, tmp_path_factory.mktemp("browser"))
    yield page
    page.close()


NUM_SHOWN = "document.querySelectorAll('#hits li').length"
FIRST_PATH = "document.querySelector('#hits a') && document.querySelector('#hits a').textContent"


def test_the_page_finds_scrolls_and_follows_an_image(server, page):
    page.open(server.address)
    page.wait("document.activeElement && document.activeElement.id === 'text'")
    page.write("a red bus")
    page.press("Enter")
    page.wait(f"{NUM_SHOWN} >= 60")
    answer = ask(server, "search?text=a+red+bus&k=1")[1]["hits"][0]
    assert page.run(FIRST_PATH) == answer["path"]
    page.wait("window.scrollTo(0, document.body.scrollHeight) || " + f"{NUM_SHOWN} === {NUM_IMAGES}")
    page.run("document.querySelectorAll('#hits button')[4].click()")
    fifth = ask(server, "search?text=a+red+bus&k=5")[1]["hits"][4]["path"]
    page.wait(f"{FIRST_PATH} === {json.dumps(fifth)}")
    page.run("history.back()")
    page.wait(f"{FIRST_PATH} === {json.dumps(answer['path'])}")
    assert page.run("document.getElementById('text').value") == "a red bus"


def test_the_page_is_used_by_keyboard(server, page):
    page.open(server.address + "?text=x")
    page.wait(f"{NUM_SHOWN} >= 60")
    page.run("document.getElementById('text').focus()")
    page.press("ArrowDown")
    page.press("ArrowRight")
    assert page.run("[...document.querySelectorAll('#hits button')].indexOf(document.activeElement)") == 1
    page.press("Enter")
    second = ask(server, "search?text=x&k=2")[1]["hits"][1]["path"]
    page.wait(f"{FIRST_PATH} === {json.dumps(second)}")
    page.press("Escape")
    page.wait(f"{NUM_SHOWN} === 0")


def test_a_dropped_image_finds_itself(server, page):
    page.open(server.address)
    page.wait("document.activeElement && document.activeElement.id === 'text'")
    page.run("""(async () => {
        const data = new DataTransfer();
        data.items.add(new File([await (await fetch('images/9')).blob()], 'nine.jpg', {type: 'image/jpeg'}));
        document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}));
    })()""")
    page.wait(f"({FIRST_PATH} || '').endsWith('/009.png')")
    assert "nine.jpg" in page.run("document.getElementById('example-name').textContent")


def test_no_caption_or_name_becomes_markup(server, page):
    page.open(server.address + "?" + urlencode({"text": EVIL, "within": "*onload*"}))
    page.wait(f"{NUM_SHOWN} === 1")
    page.wait("document.querySelector('#hits img').complete")
    assert page.run("document.querySelector('#hits p').textContent").startswith(EVIL)
    assert page.run("document.querySelector('#hits a').textContent").endswith("a<b onload=x>'&\".png")
    assert page.run("document.querySelectorAll('script').length") == 1
    assert "owned" not in page.run("document.title")


def test_the_page_fits_a_phone(server, page):
    page.send("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    page.open(server.address + "?text=x")
    page.wait(f"{NUM_SHOWN} >= 60")
    assert page.run("document.documentElement.scrollWidth") == 360
    page.send("Emulation.clearDeviceMetricsOverride")
