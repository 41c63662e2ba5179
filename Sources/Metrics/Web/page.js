// Draws what the API says. Names of VMs and groups reach the document as text only, never as markup.
"use strict";

const parts = [
  ["private", "private: memory of this VM alone"],
  ["shared", "shared: equal pages, kept once"],
  ["zero", "zero: pages of zeros, kept nowhere"],
  ["recycled", "recycled: freed by the guest"],
  ["untouched", "untouched: never used"],
  ["tmem", "tmem: kept for the guest beside its RAM"],
];
const pollMilliseconds = 5000;
const byId = (id) => document.getElementById(id);
let recordReadAt = -Infinity;
let record = null;

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawing(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// As quire status writes sizes.
function size(bytes) {
  if (bytes === 0) return "0";
  const units = ["B", "K", "M", "G", "T", "P", "E"];
  let unit = 0;
  while (bytes >= 1023.5 && unit < units.length - 1) { bytes /= 1024; unit += 1; }
  return (unit > 0 && bytes < 9.95 ? bytes.toFixed(1) : Math.round(bytes).toString()) + units[unit];
}

// The exact number is in the markup, for programs and for whoever looks closer.
function amount(bytes) {
  return element("data", { value: String(bytes), title: bytes + " bytes" }, size(bytes));
}

function describe(picture) {
  return parts.map(([key]) => key + " " + size(picture[key + "_bytes"])).join(", ");
}

function bar(picture, whole) {
  const image = drawing("svg", { viewBox: "0 0 1000 20", preserveAspectRatio: "none", role: "img",
    "aria-label": describe(picture) });
  let x = 0;
  for (const [key] of parts) {
    const width = whole > 0 ? picture[key + "_bytes"] / whole * 1000 : 0;
    if (width > 0) {
      const title = drawing("title", {}, key + " " + size(picture[key + "_bytes"]));
      image.append(drawing("rect", { class: key, x: x.toFixed(2), y: 0, width: width.toFixed(2), height: 20 }, title));
    }
    x += width;
  }
  return image;
}

// Layers over time, the first part at the bottom. What was not there yet leaves a gap.
function chart(columns, times, label) {
  const image = drawing("svg", { viewBox: "0 0 1000 100", preserveAspectRatio: "none", role: "img", "aria-label": label });
  const count = times.length;
  if (count < 2) return image;
  const begin = times[0], span = times[count - 1] - begin || 1;
  const xs = times.map((time) => ((time - begin) / span * 1000).toFixed(2));
  const sums = times.map((_, i) => parts.reduce((sum, [key]) => sum + (columns[key + "_bytes"][i] ?? 0), 0));
  const top = Math.max(...sums, 1);
  let below = times.map(() => 0);
  for (const [key] of parts) {
    const values = columns[key + "_bytes"];
    const above = below.map((value, i) => value + (values[i] ?? 0));
    const y = (value) => (100 - value / top * 100).toFixed(2);
    const up = above.map((value, i) => xs[i] + "," + y(value));
    const down = below.map((value, i) => xs[i] + "," + y(value)).reverse();
    image.append(drawing("polygon", { class: key, points: up.concat(down).join(" ") }));
    below = above;
  }
  return image;
}

class Refused extends Error {}

async function read(path) {
  const token = sessionStorage.getItem("token");
  const answer = await fetch(path, { cache: "no-store", headers: token ? { Authorization: "Bearer " + token } : {} });
  if (answer.status === 401) throw new Refused((await answer.text()).trim());
  if (!answer.ok) throw new Error((await answer.text()).trim() || "status " + answer.status);
  return answer.json();
}

function total(name, bytes, id) {
  return element("div", {}, element("dt", {}, name), element("dd", { id }, amount(bytes)));
}

function show(host, vms, groups) {
  const picture = host.picture;
  const whole = vms.reduce((sum, vm) => sum + vm.ram_bytes, 0);
  byId("totals").replaceChildren(
    total("RAM of the guests", whole, "total-ram"), total("private", picture.private_bytes, "total-private"),
    total("recycled", picture.recycled_bytes, "total-recycled"), total("saved", host.saved_bytes, "total-saved"),
    total("the host has free", host.memory_available_bytes, "total-available"));
  byId("host-bar").replaceChildren(bar(picture, whole + picture.tmem_bytes));
  if (record) {
    const times = record.times_unix_ms;
    byId("host-chart").replaceChildren(chart(record.host, times, "The same over time"));
    const minutes = times.length > 1 ? Math.round((times[times.length - 1] - times[0]) / 6000) / 10 : 0;
    byId("host-span").textContent = times.length > 1 ? "the last " + minutes + " minutes" : "a picture over time comes with the next sample";
  }

  const past = new Map((record ? record.vms : []).map((line) => [line.uid + "/" + line.name, line]));
  byId("vms").hidden = vms.length === 0;
  byId("none").hidden = vms.length !== 0;
  byId("vms").tBodies[0].replaceChildren(...vms.map((vm) => {
    const row = element("tr", { "data-uid": vm.uid, "data-name": vm.name });
    const name = element("th", { scope: "row" }, vm.name);
    if (vm.uid !== 0) name.append(" ", element("span", { class: "faint" }, "user " + vm.uid));
    const number = (key, bytes) => element("td", { class: "number", "data-part": key }, amount(bytes));
    const line = past.get(vm.uid + "/" + vm.name);
    row.append(name,
      element("td", { title: vm.reason }, vm.state), element("td", { title: vm.merging.reason }, vm.merging.state),
      element("td", {}, bar(vm.picture, vm.ram_bytes + vm.picture.tmem_bytes)), number("ram", vm.ram_bytes),
      number("private", vm.picture.private_bytes), number("shared", vm.picture.shared_bytes),
      number("zero", vm.picture.zero_bytes), number("recycled", vm.picture.recycled_bytes), number("tmem", vm.picture.tmem_bytes), number("saved", vm.saved_bytes),
      element("td", {}, line ? chart(line, record.times_unix_ms, vm.name + " over time") : ""));
    return row;
  }));

  byId("store").textContent = host.store
    ? "The page store holds " + size(host.store.store_bytes) + ", at most " + size(host.store.limit_pages * 4096) + "."
    : "The page store says nothing: " + host.store_trouble;
  byId("groups").hidden = groups.length === 0;
  byId("groups").tBodies[0].replaceChildren(...groups.map((group) => element("tr", { "data-group": group.name },
    element("th", { scope: "row" }, group.name), element("td", { class: "number" }, String(group.node)),
    element("td", { class: "number" }, String(group.vms)),
    element("td", { class: "number" }, amount(group.shared_pages * 4096)),
    element("td", { class: "number" }, amount(group.sharing_pages * 4096)),
    element("td", { class: "number" }, amount(group.saved_bytes)))));
  byId("state").textContent = vms.length + (vms.length === 1 ? " VM, " : " VMs, ") + new Date(host.time_unix_ms).toLocaleTimeString();
  byId("state").className = "";
  byId("login").hidden = true;
  byId("content").hidden = false;
}

async function poll() {
  try {
    const [host, vms, groups] = await Promise.all([read("api/v1/host"), read("api/v1/vms"), read("api/v1/groups")]);
    if (!record || performance.now() - recordReadAt >= record.interval_ms) {
      record = await read("api/v1/history");
      recordReadAt = performance.now();
    }
    show(host, vms, groups);
  } catch (error) {
    if (error instanceof Refused) {
      byId("refused").textContent = sessionStorage.getItem("token") ? error.message : "";
      byId("content").hidden = true;
      byId("login").hidden = false;
      byId("state").textContent = "A token is needed.";
      return;
    }
    byId("state").textContent = "No answer: " + error.message;
    byId("state").className = "problem";
  }
  setTimeout(poll, pollMilliseconds);
}

byId("legend").replaceChildren(...parts.map(([key, text]) => element("li", {},
  drawing("svg", { viewBox: "0 0 10 10", "aria-hidden": "true" }, drawing("rect", { class: key, width: 10, height: 10 })), text)));
byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", byId("token").value);
  byId("token").value = "";
  poll();
});
poll();
