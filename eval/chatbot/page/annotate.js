// The raters' page. Texts of models are only ever put in as text. A vote that the server does not answer is sent again
// until it does: the same vote twice counts once.

const $ = (id) => document.getElementById(id);
const token = document.querySelector('meta[name="token"]').content;
const sheets = ["welcome", "rating", "finished"];
const scores = { a: 1, 1: 1, b: 2, 2: 2, t: 3, 3: 3 };
const speakers = { user: "Human", assistant: "Assistant", system: "System" };
const patience = 1000; // milliseconds until a request is tried again

let rater = remembered();
let item = null;
let busy = false; // between a vote and what comes next

function remembered() {
  // Of this tab first, so that two people can rate in two tabs.
  return sessionStorage.getItem("rater") ?? localStorage.getItem("rater");
}

async function ask(path, content) {
  for (;;) {
    let response;
    try {
      response = await fetch(path, {
        method: "POST",
        headers: { "Content-Type": "application/json", "X-Token": token },
        body: JSON.stringify({ rater, ...content }),
      });
    } catch {
      say("The server does not answer. Trying again …");
      await new Promise((done) => setTimeout(done, patience));
      continue;
    }
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error);
    return answer;
  }
}

async function act(path, content) {
  if (busy) return;
  setBusy(true);
  try {
    show(await ask(path, content));
  } catch (error) {
    say(error.message);
    if (path === "/next") leave();
  } finally {
    setBusy(false);
  }
}

function setBusy(value) {
  busy = value;
  for (const button of document.querySelectorAll("#choices button, .undo")) {
    button.setAttribute("aria-disabled", String(value)); // "disabled" would drop the focus
  }
}

function show(state) {
  sessionStorage.setItem("rater", rater);
  localStorage.setItem("rater", rater);
  for (const place of document.querySelectorAll(".rater-name")) place.textContent = rater;
  for (const button of document.querySelectorAll(".undo")) button.hidden = state.done === 0;
  item = state.item;
  for (const button of document.querySelectorAll(".chosen")) button.classList.remove("chosen");
  if (item === null) {
    turnTo("finished");
    const votes = state.done === 1 ? "1 comparison" : `${state.done} comparisons`;
    $("tally").textContent = state.done ? `You rated ${votes}.` : "All comparisons have been rated already.";
    say(state.note || "That was the last one.", !state.note);
    $("finished-title").focus();
    return;
  }
  turnTo("rating");
  const count = `${state.done + 1} of ${state.total}`;
  $("count").textContent = count;
  $("bar").max = state.total;
  $("bar").value = state.done;
  showQuestion(state.question);
  for (const side of ["a", "b"]) {
    $(side).textContent = state[side];
    $(side).scrollTop = 0;
  }
  scrollTo(0, 0);
  say(state.note || `Comparison ${count}.`, !state.note);
  $("question-title").focus({ preventScroll: true });
}

function showQuestion(turns) {
  $("question").replaceChildren(
    ...turns.map((turn) => {
      const block = document.createElement("div");
      block.className = "turn";
      block.dir = "auto";
      if (turns.length > 1) {
        const who = document.createElement("b");
        who.textContent = speakers[turn.role] ?? "";
        block.append(who);
      }
      block.append(turn.text);
      return block;
    }),
  );
  $("question").scrollTop = $("question").scrollHeight; // of a dialogue, its last turn
}

function turnTo(name) {
  for (const sheet of sheets) $(sheet).hidden = sheet !== name;
}

function say(text, quiet = false) {
  $("note").className = quiet ? "quiet" : "";
  $("note").textContent = text;
}

function vote(score) {
  if (busy || item === null || $("rating").hidden) return;
  const button = document.querySelector(`[data-score="${score}"]`);
  button.classList.add("chosen");
  act("/vote", { item, score });
}

function undo() {
  if (![...document.querySelectorAll(".undo")].every((button) => button.hidden)) act("/undo", {});
}

function leave() {
  sessionStorage.removeItem("rater");
  localStorage.removeItem("rater");
  rater = null;
  item = null;
  turnTo("welcome");
  $("name").focus();
}

// Left, right: from one choice to the next, at first to the outer ones; Enter takes it.
function move(step) {
  const choices = [...document.querySelectorAll("#choices button")];
  const now = choices.indexOf(document.activeElement);
  const next = now < 0 ? (step < 0 ? 0 : 2) : Math.min(Math.max(now + step, 0), 2);
  choices[next].focus();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.target.matches("input")) return;
  const key = event.key.toLowerCase();
  if (key in scores && !$("rating").hidden) {
    vote(scores[key]);
  } else if (key === "u") {
    undo();
  } else if ((key === "arrowleft" || key === "arrowright") && !$("rating").hidden) {
    move(key === "arrowleft" ? -1 : 1);
  } else {
    return;
  }
  event.preventDefault();
});

for (const button of document.querySelectorAll("#choices button")) {
  button.addEventListener("click", () => vote(Number(button.dataset.score)));
}
for (const button of document.querySelectorAll(".undo")) button.addEventListener("click", undo);
for (const button of document.querySelectorAll(".leave")) {
  button.addEventListener("click", () => {
    say("");
    leave();
  });
}

$("who").addEventListener("submit", (event) => {
  event.preventDefault();
  rater = $("name").value.trim();
  if (rater) act("/next", {});
});

if (rater) act("/next", {});
else leave();
