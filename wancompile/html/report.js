(() => {
  const find = (id) => document.getElementById(id);
  const rows = [...document.querySelectorAll("#groups tbody tr")];

  const filter = () => {
    const words = find("q").value.toLowerCase().split(/\s+/).filter(Boolean);
    const role = find("role").value;
    const smoothed = find("smoothed").value;
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const fits = words.every((word) => text.includes(word))
        && (!role || row.dataset.role === role)
        && (!smoothed || row.dataset.smoothed === smoothed);
      row.hidden = !fits;
      shown += fits ? 1 : 0;
    }
    find("shown").textContent = `${shown} of ${rows.length} groups`;
  };
  for (const id of ["q", "role", "smoothed"]) find(id).addEventListener("input", filter);

  for (const figure of document.querySelectorAll(".chart")) {
    const marks = [...figure.querySelectorAll(".mark")];
    for (const button of figure.querySelectorAll(".legend button")) {
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
      button.addEventListener("mouseenter", () => dim(true));
      button.addEventListener("mouseleave", () => dim(false));
    }
  }
})();
