// Tables that come out of notebooks get a box to scroll in, so that they never push the page sideways;
// whatever scrolls can be reached with the keyboard.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll(".bd-article table")) {
    let box = table.parentElement;
    if (!box.matches(".scroll, .pst-scrollable-table-container")) {
      box = document.createElement("div");
      box.className = "scroll";
      table.replaceWith(box);
      box.append(table);
    }
  }
  const reachable = () => {
    for (const box of document.querySelectorAll(".scroll, .pst-scrollable-table-container, mjx-container[display], .cell_output .output, div.highlight pre")) {
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    }
  };
  reachable();
  window.addEventListener("resize", reachable);
  window.addEventListener("load", reachable);
});
