"use strict";
(() => {
  const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];

  // sort: numbers first the greatest, words first A; what has no number comes last, either way
  for (const table of all("table.sortable")) {
    const body = table.tBodies[0];
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", (event) => {
      const numeric = event.currentTarget.dataset.sort === "number";
      const was = heading.getAttribute("aria-sort");
      const rising = was ? was === "descending" : !numeric;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.value;
      const order = (one, other) => {
        const [a, b] = [key(one), key(other)];
        if (a === "" || b === "") return (a === "") - (b === "");
        const difference = numeric ? Number(a) - Number(b) : a.localeCompare(b);
        return rising ? difference : -difference;
      };
      body.append(...[...body.rows].sort(order));
    }));
  }

  // filter
  for (const form of all("form[data-filters]")) {
    const rows = [...document.getElementById(form.dataset.filters).tBodies[0].rows];
    const filter = () => {
      const words = form.querySelector("[data-find]").value.toLowerCase().split(/\s+/).filter(Boolean);
      const chosen = all("[data-axis]", form).filter((select) => select.selectedIndex > 0);
      for (const row of rows) {
        const text = [row.dataset.model, row.dataset.attack, row.dataset.defence, row.lastElementChild.textContent]
          .join(" ").toLowerCase();
        row.hidden = !(words.every((word) => text.includes(word))
          && chosen.every((select) => row.dataset[select.dataset.axis] === select.value));
      }
      const left = rows.filter((row) => !row.hidden).length;
      form.querySelector("[data-count]").textContent =
        left === rows.length ? `${left} cells` : `${left} of ${rows.length} cells`;
    };
    form.addEventListener("input", filter);
    form.addEventListener("submit", (event) => event.preventDefault());
    filter();  // what a browser kept from before a reload
  }

  // the heat map: one stop for Tab, arrow keys from cell to cell
  for (const table of all("table.heat")) {
    const grid = all("tr", table).map((row) => all("td.tile", row)).filter((row) => row.length);
    const buttons = all("button", table);
    const arrive = (button) => {
      buttons.forEach((other) => { other.tabIndex = other === button ? 0 : -1; });
    };
    if (buttons.length) arrive(buttons[0]);
    table.addEventListener("focusin", (event) => { if (buttons.includes(event.target)) arrive(event.target); });
    table.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      const tile = event.target.closest("td.tile");
      if (!step || !tile) return;
      let row = grid.findIndex((tiles) => tiles.includes(tile));
      let column = grid[row].indexOf(tile);
      for (;;) {
        row += step[0];
        column += step[1];
        const next = grid[row]?.[column];
        if (!next) break;
        const button = next.querySelector("button");
        if (button) { button.focus(); break; }
      }
      event.preventDefault();
    });
  }

  // a cell's images
  const cells = all("dialog.cell");
  const open = (dialog) => {
    dialog.showModal();
    dialog.scrollTop = 0;
    dialog.querySelector("h2").focus();
  };
  for (const button of all("[data-opens]")) {
    button.addEventListener("click", () => open(document.getElementById(button.dataset.opens)));
  }
  cells.forEach((dialog, number) => {
    dialog.addEventListener("click", (event) => {
      const box = dialog.getBoundingClientRect();
      const outside = event.target === dialog && (event.clientX < box.left || event.clientX > box.right
        || event.clientY < box.top || event.clientY > box.bottom);
      const step = Number(event.target.dataset.step || 0);
      if (outside || "close" in event.target.dataset || step) dialog.close();
      if (step) {
        const next = (number + step + cells.length) % cells.length;
        document.querySelector(`[data-opens="cell-${next}"]`)?.focus();
        open(cells[next]);
      }
    });
  });

  // the wipe
  for (const input of all("[data-wipe]")) {
    const figure = input.closest(".wipe");
    const move = () => {
      figure.style.setProperty("--wipe", `${input.value}%`);
      input.setAttribute("aria-valuetext", `${input.value} % ${input.dataset.before}, ${100 - input.value} % ${input.dataset.after}`);
    };
    input.addEventListener("input", move);
    move();
  }
})();
