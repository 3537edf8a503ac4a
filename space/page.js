// `js_on_load` of Gradio's `gr.HTML`: draws the conversation in `props.value`, the list of turns from app.py.
// Texts become text nodes only: no Markdown, HTML or LaTeX is rendered, and nothing is fetched.

const log = element.querySelector(".log");
const keys = new WeakMap(); // content of each child of the log
let count = 0; // of turns in the last draw
let writing = false;

function make(tag, name, text = "") {
  const node = document.createElement(tag);
  node.className = name;
  node.textContent = text;
  return node;
}

function button(name, label, act) {
  const node = make("button", name, label);
  node.type = "button";
  node.addEventListener("click", act);
  return node;
}

// Highlight a final answer in GSM8K's format, `#### n`.
function marked(text) {
  const pieces = text.split(/^(#### .+)$/m);
  return pieces.map((piece, i) => (i % 2 ? make("strong", "final", piece) : document.createTextNode(piece)));
}

function bubble(name, text, children) {
  const node = make("div", `bubble ${name}`);
  const content = make("div", "text");
  content.dir = "auto";
  content.append(...children);
  node.append(content);
  if (navigator.clipboard) {
    const copy = button("copy", "Copy", async () => {
      await navigator.clipboard.writeText(text);
      copy.textContent = "Copied";
      setTimeout(() => (copy.textContent = "Copy"), 1500);
    });
    node.append(copy);
  }
  return node;
}

function tool({ code, output }) {
  const node = make("details", "tool");
  const done = output !== undefined;
  const summary = make("summary", "", "Python ");
  summary.append(make("span", "gist", (done ? `${code} → ${output}` : code).replace(/\s+/g, " ")));
  node.append(summary, make("pre", "code", code));
  if (done) node.append(make("pre", "output", output));
  node.classList.toggle("running", !done);
  return node;
}

function actions() {
  const node = make("div", "actions");
  node.append(
    button("retry", "Try again", () => trigger("retry")),
    button("undo", "Edit question", () => trigger("undo")),
    button("clear", "New conversation", () => trigger("clear")),
  );
  return node;
}

function welcome({ greeting, examples }) {
  const node = make("div", "welcome");
  const list = make("div", "examples");
  list.append(...examples.map((text) => button("example", text, () => trigger("example_select", { text }))));
  node.append(make("p", "greeting", greeting), list);
  return node;
}

const build = {
  welcome,
  tool,
  actions,
  question: ({ text }) => bubble("question", text, [document.createTextNode(text)]),
  reply: ({ text }) => bubble("reply", text, marked(text)),
  note: ({ text }) => make("div", "note", text),
  waiting: () => make("div", "waiting", "…"),
};

function items(turns) {
  if (!turns.length) return [{ kind: "welcome", greeting: props.greeting, examples: props.examples }];
  const found = [];
  for (const { question, parts, note, writing } of turns) {
    found.push({ kind: "question", text: question });
    for (const part of parts) found.push({ kind: "code" in part ? "tool" : "reply", ...part });
    if (writing && !parts.length) found.push({ kind: "waiting" });
    if (note) found.push({ kind: "note", text: note });
  }
  if (!turns[turns.length - 1].writing) found.push({ kind: "actions" });
  return found;
}

// Replace only what has changed, so that open boxes and selections persist while a reply grows.
function draw() {
  const turns = props.value || [];
  const wanted = items(turns);
  const atEnd = turns.length > count || log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  count = turns.length;
  wanted.forEach((item, i) => {
    const [old, key] = [log.children[i], JSON.stringify(item)];
    if (old && keys.get(old) === key) return;
    const fresh = build[item.kind](item);
    keys.set(fresh, key);
    if (old) old.replaceWith(fresh);
    else log.append(fresh);
  });
  while (log.children.length > wanted.length) log.lastChild.remove();
  if (atEnd) log.scrollTop = log.scrollHeight;
  const wasWriting = writing;
  writing = turns.some((turn) => turn.writing);
  if (wasWriting && !writing && matchMedia("(hover: hover)").matches) setTimeout(typeOn, 100);
}

// The box is disabled while a reply is written, and so has lost the focus.
function typeOn() {
  if (document.activeElement === document.body) document.querySelector("#question textarea")?.focus();
}

watch("value", draw);
draw();
