"""The chat page in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")
pytest.importorskip("websockets")

from newllm import Session
from newllm.serving.app import Limits
from tests.browser import CHROMIUM, Tab, opened
from tests.serving_parts import KEY, Served, serving

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt-get install chromium)")
TOKENS = 60


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path / "sessions", limits=Limits(max_tokens=TOKENS, key=KEY)) as server:
        yield server


@pytest.fixture
def tab(served: Served, tmp_path: Path) -> Iterator[Tab]:
    with opened(f"{served.url}/#session=mine", tmp_path) as page:
        page.until("document.readyState === 'complete' && typeof describe === 'function'")
        yield page


def say(tab: Tab, text: str) -> None:
    tab.value(f"at('text').value = {text!r}; at('ask').requestSubmit()")


def turns(tab: Tab) -> list[str]:
    found = tab.value("[...document.querySelectorAll('.turn span')].map(each => each.textContent)")
    assert isinstance(found, list)
    return found


def unlock(tab: Tab) -> None:
    tab.value(f"at('key').value = {KEY!r}; describe()")
    tab.until("model !== undefined")


def test_page_shows_answer_and_state_while_it_streams(served: Served, tab: Tab) -> None:
    unlock(tab)
    assert tab.value("document.querySelectorAll('.gates i').length") == 2 * 4
    assert tab.value("at('window').textContent") == "of 8 tokens"
    assert tab.value("at('session').value") == "mine"
    # Greedy, so that it can be compared.
    tab.value(
        "const plain = fetch; window.fetch = (url, options) => plain(url, options?.body ? {...options,"
        "body: JSON.stringify({...JSON.parse(options.body), temperature: 0})} : options)"
    )
    lengths = "new MutationObserver(() => (window.seen ??= []).push(at('tokens').textContent))"
    tab.value(f"{lengths}.observe(at('tokens'), {{childList: true}})")
    whole = Session(served.model, served.tokenizer)
    prompt = "Human: {}\n\nAssistant:"
    for number, text in enumerate(("Hello", "And then?")):
        say(tab, text)
        tab.until(f"!running && document.querySelectorAll('.turn').length === {2 * number + 2}")
        expected = whole.generate(("\n\n" if number else "") + prompt.format(text), max_new_tokens=TOKENS)
        assert turns(tab)[2 * number :] == [text, expected]
    total = whole.tokens[0] + 1
    assert tab.value("at('tokens').textContent") == str(total)
    assert tab.value("at('bytes').textContent") == f"{whole.state_bytes:,} bytes"
    assert tab.value("at('filled').style.width") == "100%"
    assert tab.value("at('beyond').textContent") == f"{total - 8} tokens have left it"
    seen = [int(each) for each in tab.value("window.seen")]
    assert seen == sorted(seen) and len(set(seen)) > 20
    assert float(tab.value("at('rate').textContent")) > 0


def test_page_stops_and_goes_on(served: Served, tab: Tab) -> None:
    unlock(tab)
    say(tab, "Hello")
    tab.until("document.querySelectorAll('.turn span').length === 2 && at('tokens').textContent !== '–'")
    tab.value("running && at('ask').requestSubmit()")
    tab.until("!running")
    served.idle()
    say(tab, "More")
    tab.until("!running && at('send').textContent === 'Send'")
    assert served.engine.store.names() == ["mine"]
    assert turns(tab)[-2] == "More"


def test_page_tells_what_the_server_refuses(tab: Tab) -> None:
    say(tab, "Hello")
    tab.until("!running && document.querySelectorAll('.failed').length === 1")
    assert turns(tab)[-1] == "the server does not know this API key"
    unlock(tab)
    tab.value("at('session').value = '../x'")
    say(tab, "Hello")
    tab.until("!running && document.querySelectorAll('.failed').length === 2")
    assert turns(tab)[-1].startswith("session must be 1 to 64 letters")
