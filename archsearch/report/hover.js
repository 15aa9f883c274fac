// Pointing at a trial anywhere lights it up everywhere, and shows a point's numbers at once instead of after a second.
(() => {
  const tip = Object.assign(document.createElement("div"), { id: "tip", hidden: true });
  document.body.append(tip);
  const light = (trial, on) => {
    for (const part of document.querySelectorAll(`[data-trial="${CSS.escape(trial)}"]`)) part.classList.toggle("lit", on);
  };
  for (const part of document.querySelectorAll("[data-trial]")) {
    const title = part.closest("svg") && part.querySelector("title");
    const text = title && title.textContent;
    if (title) {
      part.setAttribute("aria-label", text);
      title.remove();
    }
    part.addEventListener("pointerenter", () => {
      light(part.dataset.trial, true);
      tip.hidden = !text;
      tip.textContent = text || "";
    });
    part.addEventListener("pointermove", (event) => {
      if (tip.hidden) return;
      const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
      tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, room))}px`;
      tip.style.top = `${event.clientY > 90 ? event.clientY - tip.offsetHeight - 12 : event.clientY + 16}px`;
    });
    part.addEventListener("pointerleave", () => {
      light(part.dataset.trial, false);
      tip.hidden = true;
    });
  }
})();
