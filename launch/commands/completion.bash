# Completes KEY=VALUE and groups. It follows shtab's script above; launch/commands/completion.py puts the lists between them.
# shellcheck shell=bash disable=SC2154

# The folders of config files besides the shipped one: from --config-dir, else from NGPT_CONFIG_DIR.
_ngpt_folders() {
  local i found=
  for ((i = 1; i < COMP_CWORD; i++)); do
    case ${COMP_WORDS[i]} in
      --config-dir) found=1 && printf '%s\n' "${COMP_WORDS[i + 1]/#\~\//$HOME/}" ;;
      --config-dir=*) found=1 && printf '%s\n' "${COMP_WORDS[i]#--config-dir=}" ;;
    esac
  done
  [[ -n $found || -z ${NGPT_CONFIG_DIR-} ]] || printf '%s\n' "${NGPT_CONFIG_DIR//:/$'\n'}"
}

# $1=what is typed of a word
_ngpt_words() {
  local folder file
  if [[ $1 != *=* ]]; then
    compgen -W "${_ngpt_keys[*]}" -- "$1"
    return
  fi
  compgen -W "${_ngpt_values[*]}" -- "$1"
  while IFS= read -r folder; do
    for file in "$folder/${1%%=*}"/*.yaml; do
      file=${file##*/}
      file=${1%%=*}=${file%.yaml}
      [[ -n $folder && $file == "$1"* && $file != *'*' ]] && printf '%s\n' "$file"
    done
  done < <(_ngpt_folders)
}

# $1=what is typed of a word
_ngpt_groups() {
  compgen -W "${_ngpt_group_names[*]}" -- "$1"
}

# readline splits words at = and replaces only the part after it; shtab's function expects whole words.
_ngpt() {
  local typed=${COMP_LINE:0:COMP_POINT} word
  local -a COMP_WORDS
  read -ra COMP_WORDS <<<"$typed"
  [[ $typed == *[[:space:]] ]] && COMP_WORDS+=("")
  local COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
  word=${COMP_WORDS[COMP_CWORD]}
  _shtab_ngpt
  [[ ${COMPREPLY[0]-} == *= ]] && compopt -o nospace 2>/dev/null
  if [[ $word == *=* && $COMP_WORDBREAKS == *=* ]]; then
    COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*=}"}"}")
  fi
  return 0
}

complete -o default -F _ngpt ngpt
