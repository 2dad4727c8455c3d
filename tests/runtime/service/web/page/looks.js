// What is wrong with how the page looks. Each function returns descriptions; none if all is well.

const named = (each) => each.outerHTML.slice(0, 80);
const shown = (selector) =>
  [...document.querySelectorAll(selector)].filter((each) => each.checkVisibility() && !each.matches(".skip"));

// Controls that are cut off or too small to touch, and a page that scrolls sideways.
function cutOff(controls) {
  const page = document.documentElement, width = page.clientWidth;
  const found = page.scrollWidth > width ? [`the page is ${page.scrollWidth} wide`] : [];
  for (const each of shown(controls)) {
    const { left, right, height } = each.getBoundingClientRect();
    const isClipped = each.matches("button, a, select") && each.scrollWidth > each.clientWidth + 1;
    if (left < 0 || right > width || isClipped) found.push(`${named(each)} from ${left} to ${right}`);
    if (height < 24 && !each.matches("[type=checkbox]")) found.push(`${named(each)} is too small to touch`);
  }
  return found;
}

// Controls that lie over each other.
function overlaps(controls) {
  const places = shown(controls).map((each) => [each, each.getBoundingClientRect()]);
  const isOver = (a, b) =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  return places.flatMap(([one, a], place) =>
    places.slice(place + 1).filter(([, b]) => isOver(a, b)).map(([other]) => `${named(one)} over ${named(other)}`));
}

// Texts with less contrast than WCAG's level AA wants, 4.5 to 1.
function pale() {
  const parts = (colour) => colour.match(/[\d.]+/g).map(Number);
  const linear = (part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  const light = (colour) => {
    const [r, g, b] = parts(colour).slice(0, 3).map((part) => linear(part / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const groundOf = (each) => {
    const ground = getComputedStyle(each).backgroundColor;
    return (parts(ground)[3] ?? 1) === 1 ? ground : groundOf(each.parentElement);
  };
  const found = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const words = texts.currentNode.data.trim(), each = texts.currentNode.parentElement;
    if (!words || !each.checkVisibility() || each.matches(":disabled, option, script, noscript")) continue;
    const [most, least] = [light(getComputedStyle(each).color), light(groundOf(each))].sort((a, b) => b - a);
    const contrast = (most + 0.05) / (least + 0.05);
    if (contrast < 4.5) found.push(`${words}: ${contrast.toFixed(2)}`);
  }
  return found;
}

// Ids that several elements have.
function sharedIds() {
  const ids = [...document.querySelectorAll("[id]")].map((each) => each.id);
  return ids.filter((id, place) => ids.indexOf(id) !== place);
}
