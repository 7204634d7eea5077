(() => {
  const find = (id) => document.getElementById(id);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const wordsOf = (field) => field.value.toLowerCase().split(/\s+/).filter(Boolean);
  const holds = (element, words) => {
    const text = element.textContent.toLowerCase();
    return words.every((word) => text.includes(word));
  };

  const rows = all("#groups tbody tr");
  const filterGroups = () => {
    const words = wordsOf(find("q"));
    const role = find("role").value;
    const smoothed = find("smoothed").value;
    let shown = 0;
    for (const row of rows) {
      const fits = holds(row, words)
        && (!role || row.dataset.role === role)
        && (!smoothed || row.dataset.smoothed === smoothed);
      row.hidden = !fits;
      shown += fits ? 1 : 0;
    }
    find("shown").textContent = `${shown} of ${rows.length} groups`;
  };
  for (const id of ["q", "role", "smoothed"]) find(id).addEventListener("input", filterGroups);

  const kinds = all(".kind");
  const search = () => {
    const words = wordsOf(find("find"));
    let boxes = 0, lines = 0;
    for (const kind of kinds) {
      for (const box of all(".box", kind)) {
        const fits = words.length > 0 && holds(box, words);
        box.classList.toggle("hit", fits);
        box.classList.toggle("dim", words.length > 0 && !fits);
        boxes += fits && !kind.hidden ? 1 : 0;
      }
      for (const line of all(".row:not(.head)", kind)) {
        const fits = holds(line, words);
        line.hidden = !fits;
        lines += fits && !kind.hidden ? 1 : 0;
      }
      if (words.length) for (const part of all("details", kind)) part.open = true;
    }
    find("found").textContent = words.length ? `${boxes} boxes, ${lines} lines` : "";
  };
  const choose = () => {
    const menu = find("kind");
    if (menu) for (const kind of kinds) kind.hidden = kind.dataset.kind !== menu.value;
  };
  if (find("find")) {
    find("find").addEventListener("input", search);
    if (find("kind")) {
      find("kind").addEventListener("input", () => { choose(); search(); });
      choose();
    }
  }

  // `report.html#find=to_q` opens the page with a search done, such as for a link to a site.
  const preset = () => {
    const wanted = /^#find=(.*)$/.exec(location.hash);
    if (!wanted) return;
    for (const id of ["find", "q"]) {
      const field = find(id);
      if (!field) continue;
      field.value = decodeURIComponent(wanted[1]);
      field.dispatchEvent(new Event("input"));
    }
    (find("graph") || find("groups")).scrollIntoView();
  };
  addEventListener("hashchange", preset);
  preset();

  for (const figure of all(".chart")) {
    const marks = all(".mark", figure);
    for (const button of all(".legend button", figure)) {
      const series = `c${button.dataset.series}`;
      button.setAttribute("aria-pressed", "true");
      button.addEventListener("click", () => {
        const visible = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", String(visible));
        for (const mark of marks) {
          if (mark.classList.contains(series)) mark.classList.toggle("off", !visible);
        }
      });
      const dim = (on) => {
        for (const mark of marks) {
          mark.classList.toggle("dim", on && !mark.classList.contains(series));
        }
      };
      for (const name of ["mouseenter", "focus"]) button.addEventListener(name, () => dim(true));
      for (const name of ["mouseleave", "blur"]) button.addEventListener(name, () => dim(false));
    }
  }
})();
