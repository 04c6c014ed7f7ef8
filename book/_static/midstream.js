// Tables that come out of notebooks get a box to scroll in, so that they never push the page sideways, and on a
// phone the claim tables stack their cells under the names of their columns. Whatever scrolls can be reached by key,
// and the folds of the sidebar have names.
document.addEventListener("DOMContentLoaded", () => {
  const boxes = ".scroll, .midstream-table, .pst-scrollable-table-container";
  for (const table of document.querySelectorAll(".bd-article table")) {
    if (table.closest(boxes)) continue;
    const box = document.createElement("div");
    box.className = "scroll";
    table.replaceWith(box);
    box.append(table);
  }
  for (const table of document.querySelectorAll(".midstream-table table, table.stacked")) {
    const names = [...table.querySelectorAll("thead th")].map((cell) => cell.textContent);
    for (const row of table.tBodies[0].rows) [...row.cells].forEach((cell, i) => (cell.dataset.label = names[i] ?? ""));
    table.classList.add("stacked");
  }
  for (const fold of document.querySelectorAll(".bd-links summary")) {
    const name = fold.closest("li")?.querySelector("a")?.textContent.trim();
    fold.setAttribute("aria-label", `Chapters of ${name}`);
  }
  document.querySelectorAll(".citation-list").forEach((list) => list.removeAttribute("role")); // its children are no listitems
  const scrolling = `${boxes}, mjx-container[display], .cell_output .output, div.highlight pre`;
  const reachable = () => {
    for (const box of document.querySelectorAll(scrolling)) {
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    }
  };
  reachable();
  window.addEventListener("resize", reachable);
  window.addEventListener("load", reachable);
});
