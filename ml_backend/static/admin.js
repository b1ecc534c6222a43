// Renews what carries data-live="seconds", from the very page it is on; without this script, reloading does the same.
(() => {
  "use strict";
  const waits = (part) => Number(part.dataset.live) * 1000;

  async function renew(part) {
    if (!document.hidden && window.getSelection().toString() === "") {
      try {
        const answer = await fetch(location.pathname + location.search, { headers: { Accept: "text/html" } });
        if (answer.status === 401) location.reload(); // the login has ended
        if (answer.ok && !answer.redirected) {
          const page = new DOMParser().parseFromString(await answer.text(), "text/html");
          const fresh = page.getElementById(part.id);
          if (fresh) {
            const live = fresh.dataset.live;
            replace(part, fresh);
            if (live) part.dataset.live = live; else delete part.dataset.live;
          }
        }
      } catch (error) { /* the server is away for a moment */ }
    }
    if (part.dataset.live) setTimeout(renew, waits(part), part);
  }

  // Parts one by one, so that what has not changed keeps its place, and what has the focus keeps it.
  function replace(old, fresh) {
    const [was, is] = [[...old.children], [...fresh.children]];
    const focused = old.contains(document.activeElement);
    if (was.length !== is.length) {
      if (!focused) old.replaceChildren(...is);
      return;
    }
    was.forEach((child, place) => {
      if (child.isEqualNode(is[place])) return;
      if (child.contains(document.activeElement)) {
        if (child !== document.activeElement) replace(child, is[place]);
      } else if (child.children.length && child.children.length === is[place].children.length && !child.matches("svg, table")) {
        replace(child, is[place]);
      } else if (child.matches("[role=status]")) {
        child.textContent = is[place].textContent; // the region stays, so that its news are announced
      } else {
        child.replaceWith(is[place]);
      }
    });
  }

  document.querySelectorAll("[data-live]").forEach((part) => setTimeout(renew, waits(part), part));
})();
