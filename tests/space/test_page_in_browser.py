"""The chat page in Chromium: the model and the visitor read exactly what is written, and nothing else happens."""

import shutil
import threading

import pytest

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
from page import ScriptedEngine, app  # noqa: E402

from modeling_nanochat.chat.turn import Finished, TextDelta, ToolCall, ToolResult  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

TEXTS = [
    "2*3*4 = 24, 5*6*7 = 210.\n#### 24",
    "use <div> and <think>hm</think> x<y",
    "<test> tell me <b>bold</b> &lt;b&gt; &amp; &#60;",
    "![i](http://example.com/y.png) [l](http://example.com) http://example.com <http://example.com>",
    "<img src=http://example.com/a.png onerror=document.title='x'><video src=//example.com/v></video>",
    "<style>* { display: none }</style><div style='position:fixed;inset:0;background:url(//example.com/b)'>x</div>",
    (
        "<form action=//example.com><input name=a></form><details><summary>s</summary>d</details>"
        "<iframe src=//example.com>"
    ),
    "<script>document.title = 'x'</script><svg onload=\"document.title='x'\"/>",
    "$x$ $$\\frac{1}{2}$$ \\(a\\) \\[b\\] ${document.title='x'} {{value}} {{{value}}}",
    "`a` ```b``` ````c```` `````d````` ``````e``````\n```python\n1\n```",
    "# one\n## two\n---\n> quoted\n- item\n1. item\n| a | b |\n|---|---|\n    indented\ttab\n\n\nend ",
    "  leading, _under_, **bold**, ~~gone~~, trailing  ",
    'src="/file=a" <!-- hidden --> <![CDATA[x]]> <?php x ?>',
    "米拉有12个梨。她又找到7个梨。\n她现在有多少个梨？🍐👩‍👩‍👧",
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def served(toy_model_and_tokenizer):
    engine = ScriptedEngine(*toy_model_and_tokenizer)
    demo = app.build_demo(engine, "toy", ["Who are <b>you</b>?", "What is 2*3*4?", "你是谁？", "A fourth?"])
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **app.appearance())
    yield engine, url
    demo.close()


@pytest.fixture
def visit(browser, served):
    """Opens the page in its own window; at the end no window may have asked another host for anything, or failed."""
    engine, url = served
    contexts, requests, errors = [], [], []

    def opened(**options):
        context = browser.new_context(**options)
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        page.wait_for_selector(".greeting")
        return page

    engine.events = None
    yield opened
    for context in contexts:
        context.close()
    assert [where for where in requests if not where.startswith((url, "data:", "blob:"))] == [] and errors == []


def ask(page, question):
    before = page.locator(".question").count()
    page.locator("textarea").fill(question)
    page.locator("textarea").press("Enter")
    finished(page, before + 1)


def finished(page, turns):
    page.wait_for_function(
        f"document.querySelectorAll('.question').length == {turns} && document.querySelector('.actions')"
    )
    page.wait_for_selector("button.stop-button", state="detached")


def texts(page, selector):
    return page.locator(selector).evaluate_all("nodes => nodes.map(node => node.textContent)")


def says(*parts):
    return [*parts, Finished([], "stop")]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_is_written_is_shown_letter_for_letter_and_nothing_is_fetched(visit, served, scheme):
    engine, _ = served
    page = visit(color_scheme=scheme)
    for text in TEXTS:
        engine.events = says(TextDelta(text[:5]), TextDelta(text[5:]))
        ask(page, text)
        assert texts(page, ".question .text") == texts(page, ".reply .text") == [text]
        assert engine.asked[-1][0] == [{"role": "user", "content": text}]
        markup = page.locator(".text *").evaluate_all("nodes => nodes.map(node => node.outerHTML)")
        assert markup == (['<strong class="final">#### 24</strong>'] if "####" in text else [])
        page.click("text=New conversation")
        page.wait_for_selector(".greeting")
    assert page.title() == "toy"


def test_lines_and_blanks_are_seen_as_they_were_written(visit, served):
    engine, _ = served
    engine.events = says(TextDelta("a\n\n  b   c"))
    page = visit()
    ask(page, "Hi")
    assert page.locator(".reply .text").inner_text() == "a\n\n  b   c"


def test_copying_gives_what_was_written(visit, served):
    engine, _ = served
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    text = "2*3*4 = <b>24</b> &lt;\n#### 24"
    engine.events = says(TextDelta(text))
    ask(page, "Hi")
    page.hover(".reply")
    page.click(".reply .copy")
    page.wait_for_selector("text=Copied")
    assert page.evaluate("navigator.clipboard.readText()") == text


def test_calls_are_boxes_that_open_on_a_click(visit, served):
    engine, _ = served
    code, output = (
        "print('```<b>1</b>```')\n# [x](http://example.com)",
        "<img src=http://example.com/a.png>\n\n```text\n${1}",
    )
    engine.events = says(TextDelta("Let me see. "), ToolCall(code), ToolResult(output), TextDelta("Done."))
    page = visit()
    ask(page, "Hi")
    assert texts(page, ".tool pre.code") == [code] and texts(page, ".tool pre.output") == [output]
    assert not page.locator("pre.output").is_visible()
    page.click("summary")
    assert page.locator("pre.output").is_visible()
    ask(page, "Again?")
    assert page.locator("pre.output").first.is_visible() and not page.locator("pre.output").last.is_visible()
    called = [message for message in engine.asked[-1][0] if message.get("tool_calls")]
    assert called[0]["tool_calls"][0]["function"]["arguments"]["code"] == code
    assert engine.asked[-1][0][2] == {"role": "tool", "name": "python", "content": output}


def test_a_stopped_reply_stays_and_the_conversation_goes_on(visit, served):
    engine, _ = served
    let_go = threading.Event()

    def endless():
        yield TextDelta("Once upon")
        yield ToolCall("1")
        yield ToolResult("1")
        while not let_go.wait(0.05):
            yield TextDelta(" a time")

    engine.events = endless()
    page = visit()
    page.locator("textarea").fill("Tell me a story.")
    page.locator("textarea").press("Enter")
    page.wait_for_function("document.querySelectorAll('.reply').length == 2")
    assert page.locator(".actions").count() == 0 and page.locator("textarea").is_disabled()
    page.click("button.stop-button")
    finished(page, 1)
    page.wait_for_function("document.activeElement.tagName == 'TEXTAREA'")
    let_go.set()
    first, second = texts(page, ".reply .text")
    assert first == "Once upon" and second.startswith(" a time")
    engine.events = says(TextDelta("The end."))
    ask(page, "And then?")
    *_, answered, question = engine.asked[-1][0]
    assert answered["content"].startswith(second) and question["content"] == "And then?"


def test_again_edit_and_new_conversation(visit, served):
    engine, _ = served
    page = visit()
    engine.events = says(TextDelta("One."))
    ask(page, "First?")
    ask(page, " Second <b>? ")
    engine.events = says(TextDelta("Two."))
    page.click("text=Try again")
    page.wait_for_selector("text=Two.")
    finished(page, 2)
    assert texts(page, ".reply .text") == ["One.", "Two."]
    assert [message["content"] for message in engine.asked[-1][0]] == ["First?", "One.", " Second <b>? "]
    page.click("text=Edit question")
    page.wait_for_function("document.querySelectorAll('.question').length == 1")
    assert page.locator("textarea").input_value() == " Second <b>? "
    page.click("text=New conversation")
    page.wait_for_selector(".greeting")
    ask(page, "Afresh?")
    assert engine.asked[-1][0] == [{"role": "user", "content": "Afresh?"}]


def test_three_examples_are_shown_and_a_click_asks_one(visit, served):
    engine, _ = served
    page = visit()
    assert texts(page, ".example") == ["Who are <b>you</b>?", "What is 2*3*4?", "你是谁？"]
    engine.events = says(TextDelta("24."))
    page.locator(".example").nth(1).click()
    finished(page, 1)
    assert engine.asked[-1][0] == [{"role": "user", "content": "What is 2*3*4?"}]
    assert texts(page, ".reply .text") == ["24."]


def test_a_refused_question_says_why_and_can_be_edited(visit, served):
    engine, _ = served
    page = visit()
    ask(page, "lamp " * 400)
    assert "the question itself is too long" in page.locator(".note").inner_text()
    page.click("text=Edit question")
    page.wait_for_selector(".greeting")
    assert page.locator("textarea").input_value() == "lamp " * 400
    page.locator("textarea").fill("")
    page.locator("textarea").press("Enter")
    # Nothing shows when the empty question was seen to; until then the page takes no other.
    page.wait_for_timeout(1500)
    engine.events = says(TextDelta("Hello."))
    ask(page, "Hi")
    assert texts(page, ".question .text") == ["Hi"]


def test_on_a_phone_nothing_sticks_out(visit, served):
    engine, _ = served
    page = visit(viewport={"width": 360, "height": 700})
    long = "a" * 300
    engine.events = says(TextDelta(long), ToolCall(long), ToolResult(long), TextDelta(f"#### {long}"))
    ask(page, long[:120])
    page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    inside = "n => [...n.querySelectorAll('.bubble, .tool, pre')].every(b => b.getBoundingClientRect().right <= 360)"
    assert page.locator("#conversation").evaluate(inside)
    assert page.locator(".log").evaluate("n => n.scrollWidth <= n.clientWidth")
