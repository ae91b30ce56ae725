// The server's JSON, with the API key where one is asked for.

const KEY = "draftloop-api-key";

export class KeyWanted extends Error {}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;

/** GET. Throws KeyWanted where the key is missing or wrong, else an Error with the server's message. */
export const get = (path) => ask(path, { method: "GET" });

/** POST an empty JSON object. */
export const post = (path) => ask(path, { method: "POST", body: "{}", headers: { "Content-Type": "application/json" } });

async function ask(path, options) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(`/api/${path}`, { ...options, headers, credentials: "omit", cache: "no-store" });
  } catch {
    throw new Error("The server does not answer. The page tries again every few seconds.");
  }
  if (response.status === 401) throw new KeyWanted();
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(body.error?.message ?? `The server said ${response.status}.`);
  return body;
}
