// The sliders of "What if?" are answered while one drags. Without this file the form's own button does the same.
"use strict";
(() => {
  const form = document.getElementById("what-if");
  const answer = document.getElementById("answer");
  let asking = null;
  let waiting = false;

  const fields = () => new URLSearchParams(new FormData(form));

  async function ask() {
    if (asking) {
      waiting = true; // the newest position is asked for when the answer under way is here
      return;
    }
    asking = fields();
    try {
      const reply = await fetch(form.action, {
        method: "POST",
        headers: { "X-CSRF-Token": form.dataset.token },
        body: asking,
        credentials: "same-origin",
      });
      answer.innerHTML = await reply.text(); // made by our own templates, which escape whatever is not ours
      history.replaceState(null, "", `${form.action}?${asking}`); // so that the address can be sent to a colleague
    } catch {
      form.submit(); // the server is away; let the browser say so
    } finally {
      asking = null;
      if (waiting) {
        waiting = false;
        ask();
      }
    }
  }

  form.addEventListener("input", (event) => {
    const shown = form.querySelector(`output[for="${CSS.escape(event.target.id)}"]`);
    if (shown) {
      shown.value = Number(Number(event.target.value).toPrecision(3)).toString().replace("-", "−");
    }
    ask();
  });
})();
